"""``python -m forge.training COMMAND``."""

from forge.training.cli import main

main()
