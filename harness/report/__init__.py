"""The report: a gate's benchmark JSON and run records become report.md and one self-contained report.html."""
