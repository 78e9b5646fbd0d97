"""Instruments of the export suite, each a process of its own."""
