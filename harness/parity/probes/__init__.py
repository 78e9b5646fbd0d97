"""Instruments of the parity suite, each a process of its own."""
