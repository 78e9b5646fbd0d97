"""The other end of :mod:`forge.training.llamacpp.parent`; not for direct use.

``python -m forge.training.llamacpp.child ANSWER_FD PARENT_PID [MEMORY_LIMIT_BYTES]``
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from forge.training.system.errors import ForgeError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


# The only functions that can be asked for, below forge.training: what they import may crash, hang or exit.
# One with a parameter ``progress`` is given a function that sends text to the parent.
TASKS = {
    "status": "forge.training.llamacpp.native:status",
    "verify": "forge.training.llamacpp.native:verify",
    "quantize": "forge.training.llamacpp.native:quantize",
    "collect_importance": "forge.training.llamacpp.importance:collect_importance",
    "convert": "forge.training.llamacpp.converter:convert",
    "convert_lora": "forge.training.llamacpp.converter:convert_lora",
    "check_adapter": "forge.training.adapter.lora:describe_adapter",
    "merge": "forge.training.adapter.merge:merge_adapter",
    "write_reference": "forge.training.evaluation.divergence:write_reference",
    "compare_merged": "forge.training.evaluation.divergence:compare_merged",
    "compare_gguf": "forge.training.evaluation.divergence:compare_gguf",
    "open_chat": "forge.training.llamacpp.answers:open_chat",
    "reply": "forge.training.llamacpp.answers:reply",
    "open_logits": "forge.training.llamacpp.answers:open_logits",
    "write_logits": "forge.training.llamacpp.answers:write_logits",
    "continue_greedily": "forge.training.llamacpp.answers:continue_greedily",
    "open_vocabulary": "forge.training.llamacpp.answers:open_vocabulary",
    "tokenize": "forge.training.llamacpp.answers:tokenize",
    "detokenize": "forge.training.llamacpp.answers:detokenize",
    "render": "forge.training.llamacpp.answers:render",
}


def _carry_out(task: str, arguments: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    module, _, name = TASKS[task].partition(":")
    function = getattr(importlib.import_module(module), name)
    if "progress" in inspect.signature(function).parameters:
        arguments = {**arguments, "progress": progress}
    answer = function(**arguments)
    return asdict(answer) if is_dataclass(answer) else answer  # type: ignore[arg-type]


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before prctl
        os._exit(1)


def _peak_rss_bytes() -> int:
    """VmHWM, which begins anew with this program; ru_maxrss would still hold the parent's at the fork."""
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(arguments: list[str]) -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a reply listens to it
    _die_with_parent(int(arguments[1]))
    if len(arguments) > 2:
        limit_bytes = int(arguments[2])
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    with os.fdopen(int(arguments[0]), "w", encoding="utf-8") as answers:

        def send(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        for line in sys.stdin:
            request = json.loads(line)
            try:
                value = _carry_out(request["task"], request["arguments"], lambda text: send({"progress": text}))
                send({"value": value, "peak_rss_bytes": _peak_rss_bytes()})
            except ForgeError as error:
                send({"error": {"kind": type(error).__name__, "message": error.message, "remedy": error.remedy}})
            except MemoryError:
                send({"error": {"kind": "memory", "message": "it needs more memory than it is given"}})
            except Exception as error:  # reported to the parent, which decides
                traceback.print_exc()
                summary = f"{request['task']} failed: {type(error).__name__}: {error}"
                send({"error": {"kind": "unexpected", "message": summary}})


if __name__ == "__main__":
    main(sys.argv[1:])
