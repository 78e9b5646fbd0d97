"""Everything that can be known about a config before hours are spent, all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from forge.training.backends import Backend, describe_plan_source, load_backend, load_plan
from forge.training.checks.data import check_data
from forge.training.checks.finding import Finding, exit_code, failure, guarded, ok, print_findings, warning
from forge.training.checks.machine import check_disk, check_gpu, check_layout, check_llama_cpp, check_memory, check_wsl
from forge.training.checks.model import check_examples, check_export, check_fit, check_tokenizer, find_base, is_made
from forge.training.checks.packages import check_attention, check_packages
from forge.training.config.workload import Workload
from forge.training.system.environment import describe_gpu
from forge.training.system.errors import ConfigurationError, ForgeError, MachineError

LLAMA_CPP = "llama.cpp"
__all__ = ["Finding", "check_workload", "exit_code", "print_findings", "questions_before_training"]


def check_workload(
    workload: Workload, backend: Backend, directory: Path | None = None, plan_overrides: Sequence[str] = ()
) -> list[Finding]:
    """Check a config for a backend on this machine. Nothing is made, fetched or written.

    ``directory``: where the run will be, by default below the current one. torch is imported only
    where the base is there: by transformers, for its tokenizer.
    """
    return list(_findings(workload, backend, directory or Path.cwd(), list(plan_overrides)))


def questions_before_training(
    workload: Workload, backend: Backend, directory: Path, plan: Sequence[str], announce: Callable[[str], None]
) -> Callable[[], None]:
    """What `forge train` asks before it begins: what `forge check` does, but for the examples, which it makes itself.

    The function that is returned asks, and refuses with the same exit code; a warning is announced once, however often
    it is asked. transformers is not imported, which Unsloth must be the first to do. Without llama.cpp it still trains.
    """
    told: set[str] = set()

    def ask() -> None:
        asked = _findings(workload, backend, directory, list(plan), before_training=True)
        findings = [finding for finding in asked if finding.level != "ok"]
        errors = [finding for finding in findings if finding.level == "error" and finding.subject != LLAMA_CPP]
        for finding in findings:
            line = f"{finding.subject}: {finding.message}"
            if finding not in errors and line not in told:
                told.add(line)
                announce(f"warning: {line}" + (f"\n  -> {finding.remedy}" if finding.remedy else ""))
        if len(errors) == 1:
            raise ForgeError.of_child(errors[0].exit_code, errors[0].message, remedy=errors[0].remedy)
        if errors:
            lines = [f"  {e.subject}: {e.message}" + (f"\n    -> {e.remedy}" if e.remedy else "") for e in errors]
            message = f"{len(errors)} things are wrong before the first step\n" + "\n".join(lines)
            raise ForgeError.of_child(errors[0].exit_code, message, remedy="`forge check` shows all that was looked at")

    return ask


def _findings(
    workload: Workload,
    backend: Backend,
    directory: Path,
    plan_overrides: list[str],
    *,
    before_training: bool = False,
) -> Iterator[Finding]:
    gpu = describe_gpu()
    llama_cpp = list(guarded(LLAMA_CPP, check_llama_cpp))
    yield from guarded("configuration", partial(check_configuration, workload, backend, plan_overrides))
    plan = None
    with suppress(ConfigurationError):  # said above
        plan = load_plan(workload, backend, plan_overrides)
    data = list(guarded("data", partial(check_data, workload)))
    yield from data
    try:
        base, findings = find_base(workload, gpu is not None)
        yield from findings
    except ForgeError as error:
        base = None
        yield failure("model", error)
    if base is not None:
        yield from guarded("model", partial(check_fit, workload, base))
        if is_made(base):
            tokenizer = list(guarded("tokenizer", partial(check_tokenizer, base)))
            yield from tokenizer
            if not exit_code(tokenizer) and not before_training:
                readable = not exit_code(data)
                yield from guarded("examples", partial(check_examples, workload, base, data_is_readable=readable))
        yield from guarded("memory", partial(check_memory, workload, base, gpu))
        if plan is not None:
            yield from guarded("layout", partial(check_layout, workload, plan, base, gpu))
        yield from guarded("disk", partial(check_disk, workload, base, directory))
        if not exit_code(llama_cpp):  # its converter is asked
            yield from guarded("export", partial(check_export, workload, base))
    yield from guarded("packages", partial(check_packages, workload, backend, gpu is not None))
    yield from guarded("GPU", partial(check_gpu, workload, backend, gpu))
    yield from guarded("attention", partial(check_attention, gpu is not None))
    yield from guarded("WSL2", partial(check_wsl, gpu))
    yield from llama_cpp


def check_configuration(workload: Workload, backend: Backend, plan_overrides: list[str]) -> Iterator[Finding]:
    """The plan, what the backend cannot do, and the trackers. Raises :class:`ConfigurationError`."""
    plan = load_plan(workload, backend, plan_overrides)
    training = workload.training
    yield ok(
        "plan",
        f"{backend}: {plan.describe_batches(workload)} examples per step, padding {plan.padding}, "
        f"checkpointing {plan.gradient_checkpointing} ({describe_plan_source(workload, backend)})",
    )
    module = load_backend(backend)
    try:
        module.refuse(workload, plan)
    except ConfigurationError as error:
        yield failure("backend", error)
    is_4_bit = workload.model.quantization == "nf4"
    if module.CASTS_ADAPTER_TO_BFLOAT16 and workload.model.dtype == "float16" and is_4_bit:
        yield warning(
            "model.dtype",
            "TRL keeps a QLoRA adapter in bfloat16, whose gradients float16's scaler cannot handle",
            "use bfloat16 on Ampere or newer",
        )
    if not (training.evaluate_every_steps or training.save_every_steps or training.save_every_minutes):
        yield warning(
            "training",
            "no save_every_steps, save_every_minutes or evaluate_every_steps: an interrupted run begins anew",
            "set training.save_every_minutes for a run of hours",
        )
    for tracker in workload.report_to:
        names = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if not any(find_spec(name) for name in names):
            yield failure(
                "report_to",
                MachineError(f"the tracker {tracker} is not installed", remedy="install it, or --set report_to=[]"),
            )
