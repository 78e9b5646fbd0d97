"""Training time and memory of the arms side by side, speed against memory, memory by phase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forge.training.report.charts.bars import Bar, bars
from forge.training.report.page.content import Chart, Row, Section, Table
from forge.training.report.page.numbers import GIB, NONE, digits, gib
from harness.perf.claims import CLAIMS
from harness.perf.suite import LEGACY as BASELINE
from harness.perf.suite import TRIALS
from harness.report.arms import ArmRuns, baseline_of, floor_bytes, ratio
from harness.report.charts.groups import groups
from harness.report.charts.points import Dot, trade_off, undominated
from harness.report.evidence import Evidence
from harness.report.page.numbers import count, percent, spread, times, with_range


def build(arms: dict[str, list[ArmRuns]], evidence: Evidence) -> Section:
    return Section(
        "training",
        "Training time and memory",
        intro=(
            f"The same examples in the same optimizer steps with each backend. An arm is a backend in a layout; "
            f"{BASELINE.name} in its own layout is the baseline. Every run is a process of its own. A layout changes "
            "speed and memory, never the mathematics of a step."
        ),
        sections=tuple(_workload(workload, of_workload, evidence) for workload, of_workload in arms.items()),
        notes=(
            "Time: the summed seconds of the measured optimizer steps, without the first ones, which compile and warm "
            "up. Memory: the highest value of the whole process, loading included; device: what the driver counts, "
            "less what was in use before. Floor: what weights, adapter and optimizer state need with any plan. "
            "Several runs: the median and, in brackets, the extremes. Speedup and share are ratios of medians to "
            f"{BASELINE.name}, for reading only: two rows may come from two machines of one kind, which differ where "
            "the GPU waits for the CPU. The runs of a pair come from one machine, one after the other; the claims "
            "above are judged on pairs.",
        ),
    )


def _workload(workload: str, arms: Sequence[ArmRuns], evidence: Evidence) -> Section:
    run = next((arm.example for arm in arms if arm.example), None)
    intro = ""
    if run and run.record:
        intro = (
            f"{run.record.workload.get('description') or workload} Measured: steps {run.num_warmup_steps + 1} to "
            f"{len(run.steps)}, {run.documents:,} documents, {run.tokens:,} tokens."
        )
    baseline = baseline_of(arms)
    pairs = tuple(_pairs_beside(workload, evidence))
    columns = ("Pair", "Seconds", "Speedup", "Of its memory")
    return Section(
        f"training-{workload}",
        workload,
        intro=intro,
        parts=(
            bars(f"time-{workload}", f"{workload}: training time, seconds", [_time_bar(arm) for arm in arms]),
            bars(f"peak-{workload}", f"{workload}: peak GPU memory", [_peak_bar(arm) for arm in arms], _floor(arms)),
            Table(
                f"{workload}: training time",
                ("Arm", "Layout", "Seconds", "Documents/s", "Tokens/s", "Speedup"),
                tuple(_time_row(arm, baseline) for arm in arms),
                texts=2,
            ),
            Table(
                f"{workload}: peak GPU memory in GiB",
                ("Arm", "Allocated", "Reserved", "Device", f"Of {BASELINE.name}'s", "Above floor"),
                tuple(_memory_row(arm, baseline, floor_bytes(arms)) for arm in arms),
            ),
            *((Table(f"{workload}: pairs beside the claims", columns, pairs),) if pairs else ()),
        ),
    )


def _pairs_beside(workload: str, evidence: Evidence) -> Iterable[Row]:
    """The pairs that no claim rests on: reported, not judged."""
    claimed = {claim.trial for claim in CLAIMS}
    for trial in evidence.trials.values():
        planned = TRIALS.get(trial.name)
        if planned is None or planned.workload != workload or trial.name in claimed:
            continue
        for pair in trial.pairs:
            baseline, candidate = (
                ArmRuns(arm.name, arm.backend, workload, (evidence.runs[run_id],))
                for arm, run_id in ((planned.baseline, pair.baseline), (planned.candidate, pair.candidate))
            )
            slow, fast = (arm.measure("measured_seconds") for arm in (baseline, candidate))
            large, small = (arm.measure("peak_allocated_bytes") for arm in (baseline, candidate))
            cells = (
                f"{candidate.name} against {baseline.name}",
                f"{with_range(fast)} against {with_range(slow)}",
                times(ratio(slow, fast)),
                percent(ratio(small, large)),
            )
            yield Row(cells, (*baseline.run_ids, *candidate.run_ids))


def _time_bar(arm: ArmRuns) -> Bar:
    seconds = arm.measure("measured_seconds")
    if seconds is None:
        return Bar(arm.name, arm.backend, None, arm.failure or "not measured")
    text = f"{digits(seconds.middle)} s"
    return Bar(arm.name, arm.backend, seconds.middle, text, low=seconds.low, high=seconds.high)


def _peak_bar(arm: ArmRuns) -> Bar:
    allocated, reserved = arm.measure("peak_allocated_bytes"), arm.measure("peak_reserved_bytes")
    if allocated is None:
        return Bar(arm.name, arm.backend, None, arm.failure or "not measured")
    outer = reserved.middle / GIB if reserved else None
    text = gib(allocated.middle) + (f" ({digits(outer)} reserved)" if outer else "")
    return Bar(arm.name, arm.backend, allocated.middle / GIB, text, outer=outer)


def _floor(arms: Sequence[ArmRuns]) -> tuple[float, str] | None:
    floor = floor_bytes(arms)
    return None if floor is None else (floor / GIB, f"weight floor {gib(floor)}")


def _time_row(arm: ArmRuns, baseline: ArmRuns | None) -> Row:
    seconds = arm.measure("measured_seconds")
    base = baseline.measure("measured_seconds") if baseline else None
    cells = (
        arm.name,
        arm.layout,
        with_range(seconds) if seconds else arm.failure or NONE,
        with_range(arm.measure("documents_per_second")),
        count(tokens.middle) if (tokens := arm.measure("tokens_per_second")) else NONE,
        NONE if arm is baseline else times(ratio(base, seconds)),
    )
    return Row(cells, arm.run_ids)


def _memory_row(arm: ArmRuns, baseline: ArmRuns | None, floor: int | None) -> Row:
    allocated = arm.measure("peak_allocated_bytes")
    base = baseline.measure("peak_allocated_bytes") if baseline else None
    cells = (
        arm.name,
        with_range(allocated, scale=GIB) if allocated else arm.failure or NONE,
        with_range(arm.measure("peak_reserved_bytes"), scale=GIB),
        with_range(arm.measure("device_used_bytes"), scale=GIB),
        NONE if arm is baseline else percent(ratio(allocated, base)),
        NONE if allocated is None or floor is None else digits((allocated.middle - floor) / GIB),
    )
    return Row(cells, arm.run_ids)


def build_trade_off(arms: dict[str, list[ArmRuns]]) -> Section:
    """Tokens per second against peak memory. Without parts where no arm has both."""
    parts: list[Chart | Table] = []
    columns = ("Arm", "Tokens/s", "Peak, GiB", "Beaten in both by")
    for workload, of_workload in arms.items():
        dots = {arm: dot for arm in of_workload if (dot := _dot(arm))}
        if not dots:
            continue
        title = f"{workload}: tokens/s against peak memory"
        parts.append(trade_off(f"pareto-{workload}", title, list(dots.values()), "peak allocated, GiB", "tokens/s"))
        best = undominated(list(dots.values()))
        rows = (
            Row((arm.name, count(dot.y), digits(dot.x), _beaten_by(dot, best)), arm.run_ids)
            for arm, dot in dots.items()
        )
        parts.append(Table(f"{workload}: speed and peak allocated", columns, tuple(rows), is_beside=True))
    return Section(
        "pareto",
        "Speed against memory",
        intro="Up and to the left is better. The broken line joins the arms that no other arm beats in both.",
        parts=tuple(parts),
    )


def _dot(arm: ArmRuns) -> Dot | None:
    speed, peak = arm.measure("tokens_per_second"), arm.measure("peak_allocated_bytes")
    if speed is None or peak is None:
        return None
    text = f"{count(speed.middle)} tokens/s at {gib(peak.middle)}"
    return Dot(arm.name, arm.backend, peak.middle / GIB, speed.middle, text)


def _beaten_by(dot: Dot, best: Sequence[Dot]) -> str:
    if dot in best:
        return "none"
    return ", ".join(other.label for other in best if other.x <= dot.x and other.y >= dot.y)


def build_phases(arms: dict[str, list[ArmRuns]]) -> Section:
    """Peak memory up to the end of each phase. Without parts where no run recorded phases."""
    parts: list[Chart | Table] = []
    for workload, of_workload in arms.items():
        measured = [(arm, phases) for arm in of_workload if (phases := _phases(arm))]
        names = list(dict.fromkeys(name for _, phases in measured for name in phases))
        if not names:
            continue
        title = f"{workload}: memory by phase"
        series = [(arm.name, arm.backend, [phases.get(name) for name in names]) for arm, phases in measured]
        parts.append(groups(f"phases-{workload}", title, names, series, "GiB", digits, _floor(of_workload)))
        floor = gib(floor_bytes(of_workload))
        rows = [
            Row((arm.name, *(digits(value) if value else NONE for value in values)), arm.run_ids)
            for (arm, _), (_, _, values) in zip(measured, series, strict=True)
        ]
        caption = f"{workload}: peak allocated by the end of each phase, GiB; weight floor {floor}"
        parts.append(Table(caption, ("Arm", *names), tuple(rows), is_beside=True))
    return Section(
        "phases",
        "Memory by phase",
        intro=(
            "Peaks up to the end of each phase, counted from the start of the process. The weight floor is "
            "computed, not measured: the linear layers in the workload's quantisation, embeddings and head in 16 "
            "bits, the adapter, its gradients and optimizer state. No plan trains with less (loading alone needs "
            "less: gradients and optimizer state come later). The rest is activations, logits and buffers."
        ),
        parts=tuple(parts),
    )


def _phases(arm: ArmRuns) -> dict[str, float]:
    """Phase -> median over the runs of the peak allocated, GiB."""
    peaks = [run.peak_by_phase() for run in arm.runs]
    names = dict.fromkeys(name for phases in peaks for name in phases)
    spreads = {name: spread([phases.get(name) for phases in peaks]) for name in names}
    return {name: values.middle / GIB for name, values in spreads.items() if values}
