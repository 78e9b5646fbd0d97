"""Runs that are killed, stopped or short of memory, on a GPU and by both stacks."""
