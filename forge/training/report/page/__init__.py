"""A report as HTML and as Markdown."""
