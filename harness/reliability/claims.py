"""What a run must survive: each claim with its statement, the run that is asked about, its judge and its bar.

The judges are pure functions: what the survival probe answers, and a bar, in; figures: the answer.
"""

from __future__ import annotations

from harness.reliability.answers import LargeRun, SmallRun, TightRun
from harness.verdict import Claim, Judged, by_faults

STOP_LIMIT_SECONDS = 30.0  # what torchrun's agent and Docker, at most, leave a process after SIGTERM
_NEEDED_EVENTS = ("step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "log")


def judge_resume(answer: SmallRun) -> Judged:
    """A resumed run's adapter is that of a whole run to the bit, as a second whole run's is."""
    faults, good = [], []
    if not answer["noise"]["identical"]:
        faults.append(f"two whole runs differ by {answer['noise']['largest']:.2g}: resumed ones cannot be compared")
    for name, run in (("killed", answer["killed"]), ("stopped", answer["stopped"])):
        difference = run["difference"]
        if not run["same_labels"]:
            faults.append(f"{name}: it did not train on the same labels")
        if not run["resumed_from_step"]:
            faults.append(f"{name}: it started from step 0 again")
        if difference["identical"]:
            good.append(f"{name}, resumed from step {run['resumed_from_step']}: identical to the bit")
        else:
            since = f", its losses since step {step}" if (step := difference["first_different_step"]) else ""
            faults.append(f"{name}: the adapter differs by {difference['largest']:.2g}{since}")
    return *by_faults(faults, "; ".join(good)), dict(answer)


def judge_memory(answer: TightRun) -> Judged:
    """It ran out of memory, and did all steps with all documents nevertheless."""
    faults, num_steps, documents = [], answer["num_steps"], answer["documents"]
    if not any(resume["after"] == "out_of_memory" for resume in answer["resumes"]):
        faults.append(f"nothing ran out of memory within {answer['cap_gib']:g} GiB")
    if num_steps != answer["num_planned_steps"] or len(set(documents)) != 1:
        faults.append(f"{num_steps} of {answer['num_planned_steps']} steps of {documents} documents")
    good = f"completed with micro-batches of {answer['micro_batch']} within {answer['cap_gib']:g} GiB"
    return *by_faults(faults, good), dict(answer)


def judge_callbacks(answer: SmallRun) -> Judged:
    """Gradients are checked before the optimizer's step; a step is logged, then evaluated, then saved."""
    faults = []
    for step in answer["events"]:
        events = step.split()
        places = [events.index(name) if name in events else -1 for name in _NEEDED_EVENTS]
        later = [events.index(name) for name in ("evaluate", "save") if name in events]
        if -1 in places or places != sorted(places) or later != sorted(later) or (later and later[0] < places[-1]):
            faults.append(f"a step's callbacks came as {step}")
    if not any("save" in step for step in answer["events"]):
        faults.append("no step was saved")
    return *by_faults(faults, f"{len(answer['events'])} kinds of steps, each in order"), dict(answer)


def judge_stop(answer: LargeRun, *, stop_seconds: float) -> Judged:
    """The process ended within ``stop_seconds`` of SIGTERM, as interrupted and with a sound checkpoint."""
    faults, took = [], f"{answer['stop_seconds']:.1f} s from SIGTERM to the end"
    if answer["state"] != "interrupted" or answer["checkpoint_problem"] is not None:
        faults.append(f"it ended {answer['state']}, its checkpoint: {answer['checkpoint_problem'] or 'sound'}")
    if answer["stop_seconds"] > stop_seconds:
        faults.append(f"{took}, limit {stop_seconds:g}")
    return *by_faults(faults, f"{took}, checkpoint of {answer['checkpoint_bytes'] / 1e6:.0f} MB sealed"), dict(answer)


CLAIMS = (
    Claim("resume", "A killed run and a stopped run resume as if nothing had happened.", "small", judge_resume),
    Claim("memory", "A step that runs out of memory is survived, the same work done.", "tight", judge_memory),
    Claim("callbacks", "The trainer's callbacks come in the order that saving relies on.", "small", judge_callbacks),
    Claim(
        "stop",
        f"At 7B a stopped run has sealed its checkpoint within {STOP_LIMIT_SECONDS:g} seconds.",
        "large",
        judge_stop,
        {"stop_seconds": STOP_LIMIT_SECONDS},
    ),
)
