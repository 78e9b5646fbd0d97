"""What the probes ``merge``, ``tokens`` and ``provenance`` answer, judged. Pure functions: an answer and bars in."""

from __future__ import annotations

from typing import Any

from harness.export.answers import Conversation, MergeAnswer, ProvenanceAnswer, TokensAnswer
from harness.verdict import Judged, by_faults


def judge_merge(answer: MergeAnswer, *, scale_tolerance: float, most_rounding: float) -> Judged:
    """``scale_tolerance``: relative, of the fitted scale. ``most_rounding``: an error / what rounding allows."""
    scale, fitted, worst = answer["scale"], answer["fitted_scale"], answer["worst"]
    missing, differing = answer["missing_tensors"], answer["differing_tensors"]
    num_pairs, num_changed = answer["num_adapter_pairs"], answer["num_changed_tensors"]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are not on both sides: {missing[0]}")
    if differing:
        faults.append(f"{len(differing)} tensors without an adapter changed, {differing[0]} for one")
    if answer["differing_files"]:
        faults.append(f"{answer['differing_files'][0]} is not the base's")
    if not num_changed or num_changed != num_pairs:
        faults.append(f"{num_pairs} adapter pairs, {num_changed} merged")
    if (stated := answer["adapter_states_scale"]) != scale:
        faults.append(f"the adapter's configuration scales by {stated:g}, the config by {scale:g}")
    if fitted is None or abs(fitted / scale - 1) > scale_tolerance:
        by = "None" if fitted is None else f"{fitted:.6g}"
        faults.append(f"the weights hold the product scaled by {by}, not {scale:g}")
    if worst["error_in_tolerances"] > most_rounding:
        faults.append(f"{worst['tensor']} is off by {worst['error_in_tolerances']:.3g} times what rounding allows")
    good = f"{num_changed} tensors merged, {answer['num_same_tensors']} untouched"
    return *by_faults(faults, f"{good}; fitted scale {fitted or 0:.6g} for {scale:g}"), dict(answer)


def judge_tokens(answer: TokensAnswer, *, least_strings: int) -> Judged:
    """No string is read differently, of at least ``least_strings``. Figures: counts and differences by ``modes``."""
    faults, modes = [], {}
    for mode, result in answer["strings"].items():
        counts: dict[str, Any] = {
            name: sum(kind[name] for kind in result["by_kind"].values())
            for name in ("num_strings", "num_equal", "num_not_nfc", "num_end_of_turn")
        }
        num_strings, num_differing, differences = counts["num_strings"], result["num_differing"], result["differences"]
        modes[mode] = {**counts, "num_differing": num_differing, "differences": differences}
        if num_differing:
            text = differences[0]["text"]
            faults.append(f"{mode}: {num_differing} of {num_strings} strings differ, {text} for one")
        if num_strings < least_strings:
            faults.append(f"{mode}: only {num_strings} strings")
    first = next(iter(modes.values()))
    good = (
        f"{first['num_strings']} strings, {first['num_equal']} equal, {first['num_not_nfc']} not in NFC,"
        f" {first['num_end_of_turn']} with ordinary text that ends a turn (known exceptions)"
    )
    return *by_faults(faults, good), {"modes": modes, "file": answer["file"]}


def judge_template(answer: TokensAnswer) -> Judged:
    """The chat template in the GGUF file."""
    rows = answer["conversations"]
    faults = [] if answer["template_is_equal"] else ["the file's template is not the tokenizer's"]
    faults += _other_texts(rows)
    faults += [f"{row['name']}: other ids" for row in rows if row["text_is_equal"] and not row["ids_are_equal"]]
    return *by_faults(faults, f"{len(rows)} conversations"), {"conversations": rows}


def judge_specials(answer: TokensAnswer) -> Judged:
    """BOS, EOS and padding. A file may name a BOS that its tokenizer lacks, as long as nothing inserts it."""
    specials = answer["specials"]
    used = specials["used"]
    faults = [
        f"{name} is {used[name]}, the tokenizer's {wanted}"
        for name, wanted in specials["tokenizer"].items()
        if wanted not in (None, used[name])
    ]
    for name, by_tokenizer, by_llama_cpp in (
        ("bos", specials["tokenizer_adds_bos"], specials["llama_cpp_adds_bos"]),
        ("eos", specials["tokenizer_adds_eos"], specials["llama_cpp_adds_eos"]),
    ):
        if by_tokenizer != by_llama_cpp:
            faults.append(f"{name} is inserted by {'llama.cpp' if by_llama_cpp else 'the tokenizer'} only")
    if specials["tokenizer"]["bos"] is None and specials["written"]["bos"] is None:
        faults.append("the file names no BOS, and llama.cpp takes an ordinary word for it")
    if not specials["eos_ends_a_turn"]:
        faults.append("llama.cpp does not stop at the tokenizer's EOS")
    return *by_faults(faults, f"ends of turn: {', '.join(specials['ends_of_turn'])}"), dict(specials)


def judge_modelfile(answer: TokensAnswer) -> Judged:
    """The Modelfile beside the files."""
    modelfile = answer["modelfile"]
    if modelfile is None:
        return "INCOMPLETE", "there is no Modelfile", {}
    rows = modelfile["conversations"]
    faults = [] if modelfile["model_exists"] else [f"it names FROM {modelfile['model']}, which is not there"]
    faults += [] if modelfile["stops_at_eos"] else ["it does not stop at the tokenizer's EOS"]
    faults += _other_texts(rows) if rows else ["it has no template"]
    return *by_faults(faults, f"{len(rows)} conversations"), dict(modelfile)


def _other_texts(rows: list[Conversation]) -> list[str]:
    return [f"{row['name']}: another text" for row in rows if not row["text_is_equal"]]


def judge_provenance(answer: ProvenanceAnswer) -> Judged:
    """Every link holds, and none is missing."""
    links = answer["links"]
    faults = [
        f"{link['artefact']}: {link['stated_in']} says {(link['stated'] or 'nothing')[:12]},"
        f" the artefact has {(link['found'] or 'nothing')[:12]}"
        for link in links
        if not link["holds"]
    ]
    artefacts = {link["artefact"] for link in links}
    needed = ("corpus, train", "examples, train, made again from the corpus", "base", "adapter", "merged weights")
    faults += [f"no record of {name}" for name in needed if name not in artefacts]
    faults += [] if any(name.endswith(".gguf") for name in artefacts) else ["no GGUF file is named"]
    return *by_faults(faults, f"{len(links)} links hold"), {"links": links}
