"""Base models: made on the spot, or found and checked."""
