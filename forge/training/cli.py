"""The commands. Each body imports what it needs, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from forge.training.backends import Backend, choose_backend
from forge.training.config.quantizations import GGUF_TYPES
from forge.training.system.command import STEP_OF_RUN, carry_out, print_json

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="forge",
    help="Documents in, a tested GGUF model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ForceRun = Annotated[bool, typer.Option("--force", help="Train afresh; what was there is kept as NAME.1 beside it.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key.")]
PlanOption = Annotated[list[str] | None, typer.Option("--plan", metavar="KEY=VALUE", help="Override a plan key.")]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a bundled one.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory written by `forge train`.")]
Plain = Annotated[bool, typer.Option("--plain", help="No colours, no bar; so too where the output is no terminal.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory; default runs/NAME-BACKEND.")]
MovedBase = Annotated[Path | None, typer.Option("--base", metavar="DIR", help="Where the run's base is now.")]
KeepMerged = Annotated[bool, typer.Option("--keep-merged", help="Keep the merged 16-bit model, in RUN/merged.")]
Budget = Annotated[
    str | None, typer.Option("--budget", metavar="SIZE", help="Of memory: 8GiB. Default: all of this machine's.")
]
BackendOption = Annotated[Literal["auto", Backend], typer.Option("--backend", help="What trains.")]


def logs() -> Console:
    """A console on stderr: what is said while a command works."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def results() -> Console:
    """A console on stdout: what a command was asked for."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _say_versions(wanted: bool) -> None:
    if wanted:
        from forge.training.system.environment import describe_versions

        sys.stdout.write(describe_versions())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_versions, is_eager=True, help="Forge, its commit, torch, transformers."
        ),
    ] = False,
) -> None:
    """Documents in, a tested GGUF model out."""


@app.command()
def init(
    root: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="Your documents.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The config to write.")] = Path("mine.yaml"),
    base: Annotated[str | None, typer.Option("--base", help="The base; default: what this machine can train.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Print every key with its default instead.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a commented config for your documents and this machine; then `forge run` it."""
    from forge.training.config.commented import template as plain_template
    from forge.training.system.errors import ConfigurationError

    if template:
        sys.stdout.write(plain_template())
        return
    if root is None:
        raise ConfigurationError("no folder was named", remedy="forge init FOLDER, or forge init --template")
    from forge.training.init import print_initialised, write_config

    written = write_config(root, output, base=base, force=force)
    print_json(written) if as_json else print_initialised(written, results())


@app.command()
def dataset(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="The repository of documents.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The corpus, JSONL.")] = Path("corpus.jsonl"),
    split: Annotated[float, typer.Option("--split", min=0.0, max=0.9, help="Share held out, by document.")] = 0.0,
    config: Annotated[
        str | None,
        typer.Option("--config", "--workload", metavar="CONFIG", help="Its instructions, include, exclude, allow."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Take files of a kind that is skipped, in gitignore syntax."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave files out, in gitignore syntax.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="FILE", help="Keep this file with the secrets in it.")
    ] = None,
    allow_secrets: Annotated[
        bool, typer.Option("--allow-secrets", help="Keep all files with secrets in them.")
    ] = False,
    questions: Annotated[
        Literal["none", "rules"] | None,
        typer.Option("--questions", help="rules: questions, sections and completions too; default: the config's."),
    ] = None,
    wordings: Annotated[
        int | None, typer.Option("--wordings", min=1, max=4, help="Of each document and question; default: 3.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a repository into instruction/input/output records, documents whole."""
    from forge.training.config.workload import DataSection, load_workload
    from forge.training.data.corpus import build_corpus, print_report
    from forge.training.data.documents import choose

    data = load_workload(config).data if config else DataSection(documents=str(root))
    choice = choose(
        root,
        [*data.include, *(include or [])],
        [*data.exclude, *(exclude or [])],
        [*data.allow, *(allow or [])],
        allow_secrets=allow_secrets,
    )
    is_asked = (questions or data.questions) == "rules"
    report = build_corpus(
        root,
        output,
        validation_share=split,
        rules=data.instructions,
        choice=choice,
        num_wordings=(wordings or data.wordings) if is_asked else 0,
        force=force,
    )
    print_json(report) if as_json else print_report(report, results())


@app.command()
def base(
    path: Annotated[
        str, typer.Argument(metavar="BASE", help="smollm2, tiny, small, qwen2-7b, a directory or a hub name.")
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="A hub revision.")] = None,
    offline: Annotated[bool | None, typer.Option("--offline/--online", help="Never or always ask the hub.")] = None,
) -> None:
    """Make or find a base model and print its directory."""
    from forge.training.models.base import resolve_base

    directory = resolve_base(path, offline=offline, revision=revision, progress=logs().print)
    sys.stdout.buffer.write(os.fsencode(directory) + b"\n")  # a program reads it: the name itself, whatever the console


@app.command()
def preview(
    workload: ConfigArgument,
    overrides: Set = None,
    num_examples: Annotated[int, typer.Option("--examples", min=0, help="Decoded examples to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what would be trained: token counts, lengths, what is cut, what is masked."""
    from forge.training.config.workload import load_workload
    from forge.training.data.inputs import refuse_unusable_sources
    from forge.training.data.preview import preview_workload, print_preview
    from forge.training.train.run import base_directory

    loaded = load_workload(workload, overrides or [])
    refuse_unusable_sources(loaded)
    report = preview_workload(loaded, base_directory(loaded), num_examples=num_examples)
    print_json(report) if as_json else print_preview(report, results())


@app.command()
def check(
    workload: ConfigArgument,
    backend: BackendOption = "auto",
    overrides: Set = None,
    plan: PlanOption = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Check everything that can be known before hours are spent: ok, warning or error, and what to do."""
    from dataclasses import asdict

    from forge.training.checks.check import check_workload, exit_code, print_findings
    from forge.training.config.workload import load_workload
    from forge.training.models.tokenizers import import_without_torch

    import_without_torch()
    findings = check_workload(load_workload(workload, overrides or []), choose_backend(backend), out, plan or [])
    print_json([asdict(f) for f in findings]) if as_json else print_findings(findings, results())
    raise typer.Exit(exit_code(findings))


@app.command()
def plan(
    workload: ConfigArgument,
    backend: BackendOption = "auto",
    budget: Budget = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="SIZE", help="Compute it for a card that is not here: 24GiB.")
    ] = None,
    overrides: Set = None,
    fixed: PlanOption = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what was measured before.")] = False,
    as_json: Json = False,
) -> None:
    """The fastest layout of this work on this machine, or within a budget of it, with the table it was chosen from."""
    from dataclasses import asdict

    from forge.training.planner.planner import parse_gib, plan_run, print_planned

    found = plan_run(
        workload,
        overrides or [],
        "unsloth" if card is not None and backend == "auto" else choose_backend(backend),
        fixed or [],
        budget_gib=None if budget is None else parse_gib(budget, "--budget"),
        card_gib=None if card is None else parse_gib(card, "--card"),
        announce=lambda line: logs().print(line, markup=False),
        again=again,
    )
    print_json(asdict(found)) if as_json else print_planned(found, results())


@app.command()
def context(
    workload: ConfigArgument,
    backend: BackendOption = "auto",
    budget: Budget = None,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Rising numbers of tokens to measure first.")
    ] = "128,512,2048,8192,32768,131072",
    seconds: Annotated[float, typer.Option("--seconds", help="How long to measure, after the load.")] = 240.0,
    overrides: Set = None,
    plan: PlanOption = None,
    as_json: Json = False,
) -> None:
    """Measure the longest document that this GPU, or a smaller one, trains on."""
    from forge.training.checks.max_context import describe_context, measure_context
    from forge.training.planner.planner import parse_gib

    answer = measure_context(
        workload,
        overrides or [],
        choose_backend(backend),
        plan or [],
        budget_gib=None if budget is None else parse_gib(budget, "--budget"),
        lengths=lengths.split(","),
        seconds=seconds,
    )
    print_json(answer) if as_json else results().print(describe_context(answer), markup=False)


@app.command()
def train(
    workload: ConfigArgument,
    backend: BackendOption = "auto",
    overrides: Set = None,
    plan: PlanOption = None,
    budget: Budget = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Insist that there is a run to resume.")] = False,
    on_oom: Annotated[
        Literal["shrink", "stop"], typer.Option("--on-oom", help="Out of GPU memory: smaller micro-batches, or stop.")
    ] = "shrink",
    continue_run: Annotated[
        Path | None,
        typer.Option("--continue", metavar="RUN", help="Train on the adapter of a complete run; default out RUN-more."),
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Train whatever `forge check` would say.")] = False,
    force: ForceRun = False,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Train an adapter. The same command again resumes a run that was stopped, and leaves a complete one as it is."""
    from forge.training.backends import load_plan
    from forge.training.config.workload import load_workload
    from forge.training.system.command import make_plain
    from forge.training.system.errors import GpuMemoryError
    from forge.training.system.files import beside
    from forge.training.system.oom import restart
    from forge.training.train.display import TrainingDisplay
    from forge.training.train.run import Listener
    from forge.training.train.run import train as train_run

    if plain:
        make_plain()
    loaded, chosen = load_workload(workload, overrides or []), choose_backend(backend)
    default = Path("runs") / f"{loaded.name}-{chosen}"
    if continue_run is not None:
        default = beside(continue_run, "-more")
    run_dir = out or default
    with TrainingDisplay(logs()) as display:
        listener = Listener(
            display.announce,
            display.show_plan,
            display.show_step,
            display.show_evaluating,
            display.show_evaluation,
            display.show_sample,
        )
        plans, planned, budget_bytes = plan or [], None, None
        if budget is not None:
            from forge.training.planner.planner import parse_gib, plan_run

            gib = parse_gib(budget, "--budget")
            planned = plan_run(workload, overrides or [], chosen, plans, budget_gib=gib, announce=display.announce)
            plans, budget_bytes = [*plans, *planned.changes], int(gib * 2**30)
        check_first = None
        if not no_check:
            from forge.training.checks.check import questions_before_training

            check_first = questions_before_training(loaded, chosen, run_dir, plans, display.announce)
        try:
            record = train_run(
                loaded,
                chosen,
                plans,
                run_dir,
                listener,
                resume=resume,
                force=force,
                check_first=check_first,
                continued=continue_run,
                budget_bytes=budget_bytes,
            )
        except GpuMemoryError as error:
            smaller = load_plan(loaded, chosen, plans).smaller(loaded)
            if on_oom == "stop" or smaller is None:
                raise
            display.announce(f"{error.message}\nresuming in a fresh process with plan.{smaller}")
            if planned is None:
                restart("--plan", smaller)
            planned.ran_out(smaller)
            restart()
    _refresh_report(run_dir)
    if as_json:
        print_json(record)
    else:
        display.show_summary(record, run_dir, results())
        _say_next(run_dir)


@app.command()
def status(run: RunArgument, as_json: Json = False) -> None:
    """Show how far a run is, and whether its process is still alive."""
    from forge.training.train.display import show_status
    from forge.training.train.progress import describe_status

    where = describe_status(run)
    print_json(where) if as_json else show_status(where, run, results())


@app.command()
def report(run: RunArgument) -> None:
    """Write RUN/report.html again: one page of what a run was, learned, answers and made."""
    from forge.training.report.run_report import write_report
    from forge.training.system.command import say, shown_path

    say(results(), shown_path(write_report(run)), "report: ")


@app.command()
def evaluate(
    run: RunArgument,
    subjects: Annotated[str, typer.Option("--subjects", help="Any of base,adapter,merged.")] = "base,adapter,merged",
    max_documents: Annotated[int | None, typer.Option("--max-documents", min=1)] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; default: cuda where there is one.")
    ] = None,
    base: MovedBase = None,
    keep_merged: KeepMerged = False,
    show: Annotated[
        bool, typer.Option("--show", help="Only show what was measured before: needs no base, measures nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Held-out loss by document, forgetting, facts and ROUGE of base, adapter and merged model."""
    from forge.training.evaluation.evaluate import evaluate_run, print_evaluation, shown_evaluation

    if show:
        stored = shown_evaluation(run)
        print_json(stored) if as_json else print_evaluation(stored, results())
        return
    evaluation = evaluate_run(
        run,
        subjects=tuple(s.strip() for s in subjects.split(",") if s.strip()),
        device=device,
        max_documents=max_documents,
        base_dir=base,
        force=force,
        keep_merged=keep_merged,
        progress=logs().print,
    )
    _refresh_report(run)
    if as_json:
        print_json(evaluation)
    else:
        print_evaluation(evaluation, results())
        _say_next(run)


@app.command()
def export(
    run: RunArgument,
    quantizations: Annotated[
        str | None, typer.Option("--quant", help=f"Any of {','.join(GGUF_TYPES)}; default: the config's.")
    ] = None,
    add: Annotated[
        str | None, typer.Option("--add", help="Only these, beside what an export made; its merge and files are used.")
    ] = None,
    imatrix: Annotated[
        Literal["auto", "none"], typer.Option("--imatrix", help="auto: weigh quantisation by your training documents.")
    ] = "none",
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of a run that is not finished: best, last or a step.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Also the adapter as GGUF.")] = False,
    keep_merged: KeepMerged = False,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Accept tensors that a quantisation cannot hold in larger types.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: RUN/export.")] = None,
    base: MovedBase = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make everything again; files that an export did not make stay.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge, convert, quantise and verify: GGUF files, Modelfile, card, SHA256SUMS. Again: make what is missing."""
    from forge.training.export.card import print_export
    from forge.training.export.export import export_run
    from forge.training.export.source import chosen_types

    chosen = chosen_types(run, quantizations, add, force=force, is_unfinished=checkpoint is not None)
    record = export_run(
        run,
        quantizations=chosen,
        lora=lora,
        out_dir=out,
        base_dir=base,
        force=force,
        keep_merged=keep_merged,
        allow_fallback=allow_fallback,
        imatrix=imatrix == "auto",
        checkpoint=checkpoint,
        progress=logs().print,
    )
    if checkpoint is None:
        _refresh_report(run, export_dir=out)
    if as_json:
        print_json(record)
    else:
        print_export(record, results())
        if checkpoint is None:
            _say_next(run, export_dir=out)


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run, its export folder or a .gguf file.")],
    question: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt; default: as trained.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="0: greedy; default: as shipped.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Of an answer; default: as shipped, else 512.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, metavar="N", help="Tokens; default: as trained, at least 2048, if they fit."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="MODEL", help="Ask another one too, such as the base as GGUF.")
    ] = None,
    lora: Annotated[Path | None, typer.Option("--lora", help="An adapter as GGUF.")] = None,
    gpu_layers: Annotated[
        int | None, typer.Option("--gpu-layers", min=0, help="Layers on the GPU; default: all, if llama.cpp has one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer to one question as a JSON document.")] = False,
) -> None:
    """Ask a model through llama.cpp, as it was trained and shipped: its system prompt, its sampling, its template."""
    import shutil
    from contextlib import suppress

    from forge.training.export.chat import chat as talk
    from forge.training.export.chat import settings_of
    from forge.training.export.shipped import find_shipped
    from forge.training.system.command import say
    from forge.training.system.errors import ConfigurationError

    if as_json and question is None:
        raise ConfigurationError("--json needs a question", remedy='forge chat MODEL "question" --json')
    shipped = find_shipped(model)
    settings = settings_of(
        shipped,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        context_tokens=context,
        gpu_layers=gpu_layers,
    )
    models = [(shipped.path, settings, lora)]
    if compare is not None:
        models.append((find_shipped(compare).path, settings, None))

    def write(text: str) -> None:
        out = sys.stderr if as_json else sys.stdout
        out.write(text)
        out.flush()

    def read_line() -> str:
        return input("> " if sys.stdin.isatty() else "")

    if question is None and sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history

    def width() -> int | None:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    answers = talk(
        models, question=question, read_line=read_line, write=write, say=lambda line: say(logs(), line), width=width
    )
    if as_json:
        print_json({"question": question, "answers": answers})


@app.command()
def run(
    workload: ConfigArgument,
    backend: BackendOption = "auto",
    overrides: Set = None,
    plan: PlanOption = None,
    budget: Budget = None,
    out: Out = None,
    force: ForceRun = False,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Everything in order, resumable at each step: check, train, evaluate, export, ask the GGUF."""
    from forge.training.config.workload import load_workload
    from forge.training.pipeline import print_outcome, run_pipeline
    from forge.training.system.command import make_plain

    if plain:
        make_plain()
    loaded, chosen = load_workload(workload, overrides or []), choose_backend(backend)
    run_dir = out or Path("runs") / f"{loaded.name}-{chosen}"
    os.environ[STEP_OF_RUN] = "1"
    try:
        outcome = run_pipeline(
            loaded,
            workload,
            chosen,
            run_dir,
            overrides=overrides or [],
            plan=plan or [],
            budget=budget,
            force=force,
            console=logs(),
        )
    finally:
        del os.environ[STEP_OF_RUN]
        if (run_dir / "run.json").is_file():
            _refresh_report(run_dir)
    if not as_json:
        print_outcome(outcome, run_dir, results())
    outcome.require_success()
    if as_json:
        print_json(outcome)
    else:
        _say_next(run_dir)


@app.command()
def schema(
    key: Annotated[
        str | None, typer.Option("--key", help="A section, a key or `plan`: as YAML with comments, for people.")
    ] = None,
) -> None:
    """Print the JSON schema of a config, for editors; with --key what one section means, for people."""
    from forge.training.config.commented import describe_key
    from forge.training.config.workload import Workload

    if key is None:
        print_json(Workload.model_json_schema())
    else:
        sys.stdout.write(describe_key(key))


def _refresh_report(run_dir: Path, *, export_dir: Path | None = None) -> None:
    """Write the run's page again. A page that fails is said and ends no command: what it shows is there already."""
    if STEP_OF_RUN in os.environ:
        return
    from forge.training.report.run_report import write_report
    from forge.training.system.command import say

    try:
        write_report(run_dir, export_dir=export_dir)
    except Exception as error:
        say(logs(), f"report.html was not written: {error}")


def _say_next(run_dir: Path, *, export_dir: Path | None = None) -> None:
    """Where the run's page is and the command to type next."""
    if STEP_OF_RUN in os.environ:
        return
    from forge.training.system.command import say, say_next, shown_path
    from forge.training.train.progress import next_command

    if (run_dir / "report.html").is_file():
        say(results(), shown_path(run_dir / "report.html"), "report: ")
    say_next(results(), next_command(run_dir, export_dir))


def main() -> NoReturn:
    """Run a command; turn every error into one message and its exit code."""
    sys.exit(carry_out(partial(app, prog_name="forge"), sys.argv[1:]))
