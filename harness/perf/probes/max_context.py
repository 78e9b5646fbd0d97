"""The longest document in a budget of GPU memory: ``python -m harness.perf.probes.max_context WORKLOAD --backend B``.

What ``forge context`` measures, with a limit of time and an answer for the store.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from forge.training.backends import BACKENDS
from harness.measurement.probe_main import add_settings, probe_main


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What fits, as :func:`forge.training.checks.max_context.measure_context` says it."""
    from forge.training.checks.max_context import measure_context

    return measure_context(
        arguments.workload,
        arguments.overrides,
        arguments.backend,
        arguments.plan_overrides,
        budget_gib=arguments.budget,
        lengths=arguments.lengths.split(","),
        seconds=arguments.seconds,
    )


def main() -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(prog="harness.perf.probes.max_context", description="The longest document.")
    parser.add_argument("workload")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--budget", type=float, help="GiB, with what CUDA itself takes; default: this GPU's own")
    parser.add_argument("--lengths", default="128,512,2048,8192,32768,131072", help="rising lengths to predict from")
    parser.add_argument("--seconds", type=float, default=240.0, help="what may be spent after the load")
    add_settings(parser)
    return probe_main(parser, answer)


if __name__ == "__main__":
    sys.exit(main())
