"""The acceptance gate: judges what forge makes. Imports no torch."""
