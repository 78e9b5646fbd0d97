"""The command line that all probes share: arguments in, one JSON document as the last line of stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from forge.training.system.errors import ForgeError


def probe_main(parser: argparse.ArgumentParser, answer: Callable[[argparse.Namespace], Mapping[str, Any]]) -> int:
    """Print what ``answer`` makes of the arguments. Returns the exit code: 0, or that of a :class:`ForgeError`.

    ``answer`` imports what it needs, so that wrong arguments are refused at once.
    """
    arguments = parser.parse_args()
    try:
        print(json.dumps(answer(arguments)))
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--set`` and ``--plan`` as the forge command has them: ``overrides`` and ``plan_overrides``."""
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--plan", action="append", default=[], dest="plan_overrides", metavar="KEY=VALUE")
