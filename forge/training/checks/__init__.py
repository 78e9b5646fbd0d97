"""What can be known before hours are spent."""
