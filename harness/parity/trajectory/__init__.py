"""Rungs 4 and 5: noise of the baseline, and the candidate within it."""
