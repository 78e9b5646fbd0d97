"""What the probes ``merge``, ``tokens`` and ``provenance`` answer, judged. Pure functions: an answer and bars in."""

from __future__ import annotations

from typing import Any

from harness.export.answers import Judged, MergeAnswer, ProvenanceAnswer, SpecialsAnswer, TokensAnswer
from harness.verdict import by_faults


def judge_merge(answer: MergeAnswer, *, scale_tolerance: float, most_rounding: float) -> Judged:
    """``scale_tolerance``: relative, of the fitted scale. ``most_rounding``: an error / what rounding allows."""
    scale, fitted, worst = answer["scale"], answer["fitted_scale"], answer["worst"]
    faults = []
    if answer["missing_tensors"]:
        faults.append(f"{len(answer['missing_tensors'])} tensors are not on both sides: {answer['missing_tensors'][0]}")
    if answer["differing_tensors"]:
        first = answer["differing_tensors"][0]
        faults.append(f"{len(answer['differing_tensors'])} tensors without an adapter changed, {first} for one")
    if answer["differing_files"]:
        faults.append(f"{answer['differing_files'][0]} is not the base's")
    if not answer["num_changed_tensors"] or answer["num_changed_tensors"] != answer["num_adapter_pairs"]:
        faults.append(f"{answer['num_adapter_pairs']} adapter pairs, {answer['num_changed_tensors']} merged")
    if answer["adapter_states_scale"] != scale:
        faults.append(
            f"the adapter's configuration scales by {answer['adapter_states_scale']:g}, the config by {scale:g}"
        )
    if fitted is None or abs(fitted / scale - 1) > scale_tolerance:
        faults.append(
            f"the weights hold the product scaled by {fitted if fitted is None else f'{fitted:.6g}'}, not {scale:g}"
        )
    if worst["error_in_tolerances"] > most_rounding:
        faults.append(f"{worst['tensor']} is off by {worst['error_in_tolerances']:.3g} times what rounding allows")
    counts = f"{answer['num_changed_tensors']} tensors merged, {answer['num_same_tensors']} untouched"
    good = f"{counts}; fitted scale {fitted or 0:.6g} for {scale:g}"
    return *by_faults(faults, good), dict(answer)


def judge_tokens(answer: TokensAnswer, *, least_strings: int) -> Judged:
    """No string is read differently, of at least ``least_strings``. Figures: counts and differences by ``modes``."""
    faults, modes = [], {}
    for mode, result in answer["strings"].items():
        kinds = result["by_kind"].values()
        num_strings = sum(kind["num_strings"] for kind in kinds)
        modes[mode] = {
            "num_strings": num_strings,
            "num_equal": sum(kind["num_equal"] for kind in kinds),
            "num_not_nfc": sum(kind["num_not_nfc"] for kind in kinds),
            "num_end_of_turn": sum(kind["num_end_of_turn"] for kind in kinds),
            "num_differing": result["num_differing"],
            "differences": result["differences"],
        }
        if result["num_differing"]:
            text = result["differences"][0]["text"]
            faults.append(f"{mode}: {result['num_differing']} of {num_strings} strings differ, {text} for one")
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
    faults += [f"{row['name']}: another text" for row in rows if not row["text_is_equal"]]
    faults += [f"{row['name']}: other ids" for row in rows if row["text_is_equal"] and not row["ids_are_equal"]]
    return *by_faults(faults, f"{len(rows)} conversations"), {"conversations": rows}


def judge_specials(answer: TokensAnswer) -> Judged:
    """BOS, EOS and padding. A file may name a BOS that its tokenizer lacks, as long as nothing inserts it."""
    specials = answer["specials"]
    faults = _wrong_ids(specials)
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


def _wrong_ids(specials: SpecialsAnswer) -> list[str]:
    wanted: dict[str, Any] = {**specials["tokenizer"]}
    used: dict[str, Any] = {**specials["used"]}
    return [
        f"{name} is {used[name]}, the tokenizer's {wanted[name]}"
        for name in ("bos", "eos", "padding")
        if wanted[name] is not None and used[name] != wanted[name]
    ]


def judge_modelfile(answer: TokensAnswer) -> Judged:
    """The Modelfile beside the files."""
    modelfile = answer["modelfile"]
    if modelfile is None:
        return "INCOMPLETE", "there is no Modelfile", {}
    rows = modelfile["conversations"]
    faults = [] if modelfile["model_exists"] else [f"it names FROM {modelfile['model']}, which is not there"]
    faults += [] if modelfile["stops_at_eos"] else ["it does not stop at the tokenizer's EOS"]
    faults += [] if rows else ["it has no template"]
    faults += [f"{row['name']}: another text" for row in rows if not row["text_is_equal"]]
    return *by_faults(faults, f"{len(rows)} conversations"), dict(modelfile)


def judge_provenance(answer: ProvenanceAnswer) -> Judged:
    """Every link holds, and none is missing."""
    links = answer["links"]
    faults = [
        f"{link['artefact']}: {link['stated_in']} says {_short(link['stated'])}, found is {_short(link['found'])}"
        for link in links
        if not link["holds"]
    ]
    artefacts = {link["artefact"] for link in links}
    needed = ("corpus, train", "examples, train, made again from the corpus", "base", "adapter", "merged weights")
    faults += [f"no record of {name}" for name in needed if name not in artefacts]
    faults += [] if any(name.endswith(".gguf") for name in artefacts) else ["no GGUF file is named"]
    return *by_faults(faults, f"{len(links)} links hold"), {"links": links}


def _short(digest: str | None) -> str:
    return "nothing" if digest is None else digest[:12]
