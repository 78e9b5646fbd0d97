"""The other end of :mod:`forge.training.llamacpp.parent`; not for direct use.

``python -m forge.training.llamacpp.child ANSWER_FD PARENT_PID [MEMORY_LIMIT_BYTES]``
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.training.system.errors import ForgeError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _status(_: Callable[[str], None]) -> dict[str, Any]:
    from forge.training.llamacpp import native

    return native.status()


def _verify(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import native

    return native.verify(**arguments)


def _quantize(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import native

    return native.quantize(**arguments)


def _convert(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import converter

    return converter.convert(**arguments)


def _convert_lora(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import converter

    return converter.convert_lora(**arguments)


def _check_adapter(_: Callable[[str], None], adapter_dir: str, base_dir: str) -> dict[str, Any]:
    from forge.training.adapter.lora import inspect_adapter
    from forge.training.models.weights import read_weights

    found = inspect_adapter(Path(adapter_dir), read_weights(Path(base_dir)))
    return {"modules": {factors.module: [factors.rank, factors.scale] for factors in found.factors.values()}}


def _merge(progress: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.adapter.merge import merge_adapter

    return merge_adapter(**arguments, progress=progress).to_json()


def _open_chat(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import chat as chat_session

    return chat_session.open_model(**arguments)


def _reply(progress: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import chat as chat_session

    return chat_session.reply(on_text=progress, **arguments)


def _open_logits(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import logits

    return logits.open_model(**arguments)


def _write_logits(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import logits

    return logits.write_logits(**arguments)


def _continue_greedily(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import logits

    return logits.continue_greedily(**arguments)


def _open_vocabulary(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import vocabulary

    return vocabulary.open_vocabulary(**arguments)


def _tokenize(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import vocabulary

    return vocabulary.tokenize(**arguments)


def _render(_: Callable[[str], None], **arguments: Any) -> dict[str, Any]:
    from forge.training.llamacpp import vocabulary

    return vocabulary.render(**arguments)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "status": _status,
    "verify": _verify,
    "quantize": _quantize,
    "convert": _convert,
    "convert_lora": _convert_lora,
    "check_adapter": _check_adapter,
    "merge": _merge,
    "open_chat": _open_chat,
    "reply": _reply,
    "open_logits": _open_logits,
    "write_logits": _write_logits,
    "continue_greedily": _continue_greedily,
    "open_vocabulary": _open_vocabulary,
    "tokenize": _tokenize,
    "render": _render,
}


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
                value = TASKS[request["task"]](lambda text: send({"progress": text}), **request["arguments"])
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
