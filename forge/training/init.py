"""`forge init FOLDER`: a commented config for these documents on this machine, from which `forge run` goes on.

It looks at what training would see: the corpus as `forge dataset` makes it, the card and the packages as `forge check`
reads them. What it cannot know, the questions, it drafts and says so.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.training.backends import Backend, choose_backend, load_backend
from forge.training.checks.check import Finding, check_workload
from forge.training.checks.layout import Layout, suggest_layout
from forge.training.checks.model import find_base
from forge.training.config.commented import WIDTH, commented_yaml
from forge.training.config.overrides import unusable_text
from forge.training.config.plan import Plan
from forge.training.config.workload import InstructionRule, Workload, load_workload
from forge.training.config.yaml import dump_yaml
from forge.training.data.corpus import CorpusReport, build_corpus, reasons
from forge.training.data.rules.facts import DraftFact, draft_facts
from forge.training.models.base import SHORT_NAMES, refuse_unknown_name
from forge.training.system.command import counted, printable, rows_table
from forge.training.system.environment import describe_gpu, package_version
from forge.training.system.errors import ConfigurationError, DataError, DiskError, ForgeError
from forge.training.system.files import refuse_existing, write_text

if TYPE_CHECKING:
    from rich.console import Console

_SHARE_HELD_OUT = 0.1
_CHARACTERS_PER_TOKEN = 3.5  # of Markdown in English by Qwen2's tokenizer, about; where no tokenizer is here yet
_PROMPT_TOKENS = 64  # of instruction and system prompt, about
_LEAST_STEPS, _MOST_EPOCHS = 60, 10
_TRIAL_STEPS = 200  # of the trial base: minutes on a CPU
_SELDOM_SET = (
    *("description", "model.revision", "model.offline", "data.train", "data.validation", "data.columns"),
    *("data.include", "data.exclude", "data.allow"),
    *("data.instructions", "data.sample", "data.loss_on", "data.control_tokens", "lora.use_rslora", "gate"),
    *("optimizer.weight_decay", "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon"),
    *("training.early_stopping_patience", "training.save_every_steps", "training.spike_limit"),
)


@dataclass(frozen=True)
class Documents:
    """What training would see. ``texts``: (path, text) of the documents that are not held out."""

    report: CorpusReport
    texts: list[tuple[str, str]]
    num_tokens: list[int]  # per document, held-out ones included
    is_counted: bool  # by the base's own tokenizer; else estimated from the characters
    longest: str
    kinds: dict[str, int]
    held_out_share: float


@dataclass(frozen=True)
class Initialised:
    """What was written, from what, and what `forge check` says of it. ``chosen``: (what, which and why)."""

    config: str
    plans: str | None
    looked_at: list[tuple[str, str]]
    chosen: list[tuple[str, str]]
    facts: list[DraftFact]
    findings: list[Finding]
    next: str


def write_config(root: Path, output: Path, *, base: str | None = None, force: bool = False) -> Initialised:
    """Write a config for the documents under ``root``, and its plan beside it where this machine has one.

    Raises :class:`DataError` where there are no documents, :class:`DiskError` where a file exists (unless ``force``),
    :class:`ConfigurationError` for a ``base`` that is none.
    """
    plans_path = output.with_name(f"{output.stem}.plans.yaml")
    if output.suffix not in (".yaml", ".yml") or output.name.endswith(".plans.yaml"):
        raise ConfigurationError(f"{output} is no name of a config", remedy="name a .yaml file: -o mine.yaml")
    for path in (output, plans_path):
        if path.is_dir():
            raise DiskError(f"{path} is a directory", remedy="name a file, for example mine.yaml")
        refuse_existing(path, force)
    if base is not None:
        refuse_unknown_name(base)
    backend = choose_backend("auto")
    gpu = describe_gpu()
    has_bitsandbytes = package_version("bitsandbytes") is not None
    layout = suggest_layout(gpu, backend, has_bitsandbytes=has_bitsandbytes, base=base)
    documents = _look_at(root, [output, plans_path], layout)
    facts = draft_facts(documents.texts)
    content, chosen = _content(root, output, layout, documents, facts)
    unusable = list(unusable_text(content))
    if unusable:
        raise ConfigurationError(f"no config can be written for {printable(str(root))}: {unusable[0]}")
    text = _head(root, output, layout) + commented_yaml(
        content, notes=_notes(layout, documents, facts, content), leave_out=_left_out(content)
    )
    default = Plan.model_validate(load_backend(backend).DEFAULT_PLAN).model_dump()
    plans: dict[str, Any] = {
        name: {key: value for key, value in plan.items() if default[key] != value}
        for name, plan in layout.plans.items()
    }
    has_plans = any(plans.values())
    if has_plans:
        head = f"# How {output.name} is laid out on this machine: speed and memory, never what is learnt.\n"
        head += "# `forge schema --key plan` explains the keys.\n"
        write_text(plans_path, head + dump_yaml(plans))
    elif force:
        plans_path.unlink(missing_ok=True)
    write_text(output, text)
    findings = check_workload(load_workload(output), backend)
    quoted = shlex.quote(str(output))
    return Initialised(
        config=str(output),
        plans=str(plans_path) if has_plans else None,
        looked_at=_looked_at(root, documents, gpu, backend),
        chosen=chosen,
        facts=facts,
        findings=[finding for finding in findings if finding.level != "ok"],
        next=f"forge run {quoted}",
    )


def _look_at(root: Path, own: Sequence[Path], layout: Layout) -> Documents:
    """The corpus as training would make it, in a folder that is forgotten."""
    rules = [InstructionRule(prefix="", text="{path}")]  # an instruction is then the document's path
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus.jsonl")
        share = _SHARE_HELD_OUT
        try:
            report = build_corpus(root, corpus, validation_share=share, rules=rules, own=own)
        except DataError:  # nothing can be held out of so few, or there are none: that is said by the next line
            share = 0.0
            report = build_corpus(root, corpus, rules=rules, own=own)
        sides = [[json.loads(line) for line in _lines(Path(output.path))] for output in report.outputs]
    rows = [(str(row["instruction"]), str(row["output"])) for side in sides for row in side]
    sizes = _count_tokens([text for _, text in rows], layout)
    num_tokens = sizes or [math.ceil(len(text) / _CHARACTERS_PER_TOKEN) for _, text in rows]
    kinds = Counter(os.path.splitext(path)[1].lower() or path.rpartition("/")[2] for path, _ in rows)
    return Documents(
        report=report,
        texts=rows[: len(sides[0])],
        num_tokens=num_tokens,
        is_counted=sizes is not None,
        longest=rows[num_tokens.index(max(num_tokens))][0],
        kinds=dict(kinds.most_common()),
        held_out_share=share,
    )


def _lines(path: Path) -> list[str]:
    with open(path, encoding="utf-8", newline="\n") as stream:
        return list(stream)


def _count_tokens(texts: list[str], layout: Layout) -> list[int] | None:
    """By the base's own tokenizer where it is on this machine; ``None`` where it is not."""
    from tokenizers import Tokenizer

    content: dict[str, Any] = {"name": "w", "model": {"path": layout.base}, "data": {"documents": "embedded"}}
    try:
        weights, _ = find_base(Workload.model_validate(content), has_gpu=True)
        path = weights.directory / "tokenizer.json" if weights is not None else None
        if path is None or not path.is_file():
            return None
        tokenizer = Tokenizer.from_file(str(path))
    except ForgeError:
        return None
    except Exception:  # the Rust library raises bare Exception; `check`, which is asked next, says what is wrong
        return None
    tokenizer.no_truncation()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _content(
    root: Path, output: Path, layout: Layout, documents: Documents, facts: Sequence[DraftFact]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The config as plain data, and what was chosen and why."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", root.resolve().name).strip("-._")[:60] or "mine"
    title = " ".join(printable(root.resolve().name).split())
    room = max(1, layout.max_length - _PROMPT_TOKENS)
    num_examples = sum(math.ceil(tokens / room) for tokens in documents.num_tokens)
    num_examples = max(1, round(num_examples * (1 - documents.held_out_share)))
    effective = 4 if layout.is_trial else 8
    steps = math.ceil(num_examples / effective)
    epochs = min(_MOST_EPOCHS, max(3, math.ceil(_LEAST_STEPS / steps)))
    planned = steps * epochs
    max_steps = _TRIAL_STEPS if layout.is_trial and planned > _TRIAL_STEPS else None
    planned = max_steps or planned
    judged = max(10, planned // 4) if documents.held_out_share and planned >= 20 else None
    content = Workload.model_validate({"name": name, "data": {"documents": "embedded"}}).model_dump(mode="json")
    content["model"] |= {"path": _base_path(layout.base, output), "quantization": layout.quantization}
    content["model"] |= {"dtype": layout.dtype}
    content["data"] |= {"documents": _relative(root, output), "validation_share": documents.held_out_share}
    content["data"] |= {"max_length": layout.max_length, "long_documents": "divide"}
    content["data"] |= {"system_prompt": f"You answer questions about the documents of {title}."}
    content["optimizer"] |= {"name": layout.optimizer, "learning_rate": 3e-3 if layout.is_trial else 2e-4}
    content["training"] |= {"epochs": float(epochs), "max_steps": max_steps, "effective_batch": effective}
    content["training"] |= {"evaluate_every_steps": judged}
    content["evaluation"] |= {"num_answers": 4 if documents.held_out_share else 0, "require_facts": False}
    content["evaluation"] |= {"facts": [{"question": fact.question, "answer": fact.answer} for fact in facts]}
    parameters = {"temperature": 0.7, "top_p": 0.9, "num_ctx": max(2048, layout.max_length)}
    content["export"] |= {"quantizations": ["q4_k_m"], "parameters": parameters}
    content["report_to"] = ["tensorboard"] if find_spec("tensorboard") else []
    is_little = epochs > 3
    chosen = [
        ("base", f"{layout.base}, {layout.quantization}, {layout.dtype}: {layout.why['model.path']}"),
        ("longest example", f"{layout.max_length:,} tokens: {layout.why['data.max_length']}"),
        ("long documents", "divided at headings, nothing is lost"),
        (
            "held out",
            f"{documents.report.num_validation:,} of {counted(documents.report.num_kept, 'document')}"
            if documents.held_out_share
            else "nothing: the documents are too few, or too much alike",
        ),
        (
            "training",
            f"{counted(max_steps, 'step')}, a trial"
            if max_steps
            else f"{epochs} times each, about {planned:,} steps"
            + (" (few documents: more often than the usual 3)" if is_little else ""),
        ),
    ]
    return content, chosen


def _base_path(base: str, output: Path) -> str:
    return _relative(Path(base), output) if base not in SHORT_NAMES and Path(base).is_dir() else base


def _relative(folder: Path, output: Path) -> str:
    """The folder as the config names it: relative to itself, unless that means something else there."""
    relative = os.path.relpath(folder.resolve(), output.absolute().parent.resolve())
    if relative.startswith("~") or relative in (*SHORT_NAMES, "embedded"):
        return str(folder.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _left_out(content: dict[str, Any]) -> list[str]:
    empty = [key for key in ("max_steps", "evaluate_every_steps") if content["training"][key] is None]
    return [*_SELDOM_SET, *(f"training.{key}" for key in empty)]


def _head(root: Path, output: Path, layout: Layout) -> str:
    lines = [
        f"# A config for the documents in {printable(root.resolve().name)}, written by `forge init` for this machine.",
        f"#   forge run {shlex.quote(output.name)}",
        "# trains, evaluates and exports a GGUF. `forge schema --key SECTION` explains every key, also those left out.",
    ]
    if layout.is_trial:
        lines.append("# Its base is a trial: every step works, but the model will know little. Name a real one below.")
    return "\n".join(lines) + "\n\n"


def _notes(
    layout: Layout, documents: Documents, facts: Sequence[DraftFact], content: dict[str, Any]
) -> dict[str, list[str]]:
    notes = {path: [why] for path, why in layout.why.items()}
    longest = max(documents.num_tokens)
    notes["data.max_length"] += [f"your longest document has {_about(documents)}{longest:,} tokens"]
    if not documents.held_out_share:
        notes["data.validation_share"] = ["nothing can be held out: the documents are too few, or too much alike"]
    notes["export.parameters"] = ["how Ollama talks: temperature 0 always says the likeliest; num_ctx is in tokens"]
    if facts:
        notes["evaluation.facts"] = [
            "DRAFTS, drawn from the documents by rule: edit them. Ask what will be asked; an answer is found where it",
            "stands, letter by letter, in what the model says, so keep it short. They are from:",
            *(f"  {printable(fact.path)}"[: WIDTH - 6] for fact in facts),
        ]
    return notes


def _about(documents: Documents) -> str:
    return "" if documents.is_counted else "about "


def _looked_at(root: Path, documents: Documents, gpu: dict[str, Any] | None, backend: Backend) -> list[tuple[str, str]]:
    report, longest = documents.report, max(documents.num_tokens)
    kinds = [f"{number:,} {printable(kind)}" for kind, number in list(documents.kinds.items())[:6]]
    others = len(documents.kinds) - len(kinds)
    card = f"{gpu['name']}, {(gpu['memory_total_bytes'] or 0) / 2**30:.1f} GiB" if gpu else "no GPU"
    rows = [
        ("documents", f"{report.num_kept:,}: {', '.join(kinds)}" + (f" and {others:,} other kinds" if others else "")),
        (
            "tokens",
            f"{_about(documents)}{sum(documents.num_tokens):,}; longest {longest:,}, {printable(documents.longest)}",
        ),
        ("machine", f"{card}; {backend} trains"),
    ]
    if report.skipped:
        rows.insert(1, ("left out", f"{len(report.skipped):,}: {reasons(report.skipped)} (`forge dataset` lists them)"))
    return rows


def print_initialised(written: Initialised, console: Console) -> None:
    """Print what was seen, what was chosen and why, the drafted questions, what `check` says, and the next command."""
    from rich.text import Text

    console.print(rows_table("init", [*written.looked_at, *written.chosen]))
    for fact in written.facts:
        console.print(Text(f"drafted: {fact.question} -> {fact.answer}"))
    for finding in written.findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        console.print(Text(f"check: {finding.level}: {finding.subject}: {finding.message}{remedy}"))
    beside = f", its plan {written.plans}" if written.plans else ""
    console.print(Text(f"wrote {written.config}{beside}; the questions in it are drafts to edit"))
    console.print(Text(f"next: {written.next}"))
