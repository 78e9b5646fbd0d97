"""A run as a page: its charts, its tables, one self-contained file."""
