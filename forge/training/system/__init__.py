"""What every stage uses: errors with exit codes, complete-or-absent files, signals, the machine."""
