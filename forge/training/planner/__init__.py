"""The fastest layout of a run for a card."""
