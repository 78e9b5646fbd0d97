"""Instruments of the reliability suite, each a process of its own."""
