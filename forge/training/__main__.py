"""``python -m forge.training COMMAND``."""

import sys

try:
    from forge.training.cli import main
except ModuleNotFoundError as error:  # another Python than the one that Forge was set up for
    package = (error.name or "forge").partition(".")[0]
    if package == "forge":
        raise
    sys.stderr.write(
        f"error: {package} is not installed for {sys.executable}\n"
        "  -> source .venv/bin/activate, then type `forge`; where there is no .venv, `make setup` makes it\n"
    )
    sys.exit(4)

main()
