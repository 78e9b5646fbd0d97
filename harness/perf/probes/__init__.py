"""Instruments of the speed and memory suite, each a process of its own."""
