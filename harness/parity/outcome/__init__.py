"""Rung 6: held-out losses of finished adapters."""
