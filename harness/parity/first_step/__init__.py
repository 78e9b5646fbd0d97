"""Rungs 1 to 3: inputs, the first step, and its layouts."""
