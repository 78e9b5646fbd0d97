"""One training run in its directory."""
