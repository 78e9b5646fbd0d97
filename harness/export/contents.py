"""What the probes ``merge``, ``tokens`` and ``lineage`` found, judged. Pure functions: their JSON in, a finding out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.export.findings import Finding, by_faults, stated

SCALE_TOLERANCE = 1e-3  # of the fitted scale, relative: a merge by 1% of it too much is ten times that


def judge_merge(found: Mapping[str, Any]) -> Finding:
    """``found``: what the probe ``merge`` printed."""
    scale, fitted, worst = found["scale"], found["fitted_scale"], found["worst"]
    faults = []
    if found["missing_tensors"]:
        faults.append(f"{len(found['missing_tensors'])} tensors are not on both sides: {found['missing_tensors'][0]}")
    if found["differing_tensors"]:
        first = found["differing_tensors"][0]
        faults.append(f"{len(found['differing_tensors'])} tensors without an adapter changed, {first} for one")
    if found["differing_files"]:
        faults.append(f"{found['differing_files'][0]} is not the base's")
    if not found["num_changed_tensors"] or found["num_changed_tensors"] != found["num_adapter_pairs"]:
        faults.append(f"{found['num_adapter_pairs']} adapter pairs, {found['num_changed_tensors']} merged")
    if found["adapter_states_scale"] != scale:
        faults.append(
            f"the adapter's configuration scales by {found['adapter_states_scale']:g}, the workload by {scale:g}"
        )
    if fitted is None or abs(fitted / scale - 1) > SCALE_TOLERANCE:
        faults.append(
            f"the weights hold the product scaled by {fitted if fitted is None else f'{fitted:.6g}'}, not {scale:g}"
        )
    if worst["error_in_tolerances"] > 1:
        faults.append(f"{worst['tensor']} is off by {worst['error_in_tolerances']:.3g} times what rounding allows")
    counts = f"{found['num_changed_tensors']} tensors merged, {found['num_same_tensors']} untouched"
    good = f"{counts}; fitted scale {fitted or 0:.6g} for {scale:g}"
    return stated("merge", *by_faults(faults, good), dict(found))


def judge_tokens(found: Mapping[str, Any]) -> Finding:
    """``found``: what the probe ``tokens`` printed."""
    faults, figures = [], {}
    for mode, result in found["strings"].items():
        rows = result["by_kind"].values()
        counts = {
            key: sum(row[key] for row in rows) for key in ("num_strings", "num_equal", "num_not_nfc", "num_end_of_turn")
        }
        figures[mode] = {**counts, "num_differing": result["num_differing"], "differences": result["differences"]}
        if result["num_differing"]:
            first = result["differences"][0]
            faults.append(
                f"{mode}: {result['num_differing']} of {counts['num_strings']} strings differ, {first['text']} for one"
            )
        if counts["num_strings"] < 200:
            faults.append(f"{mode}: only {counts['num_strings']} strings")
    first = next(iter(figures.values()))
    good = (
        f"{first['num_strings']} strings, {first['num_equal']} equal, {first['num_not_nfc']} not in NFC,"
        f" {first['num_end_of_turn']} with ordinary text that ends a turn (known exceptions)"
    )
    return stated("tokens", *by_faults(faults, good), {"modes": figures, "file": found["file"]})


def judge_template(found: Mapping[str, Any]) -> Finding:
    """The chat template in the GGUF file."""
    rows = found["conversations"]
    faults = [] if found["template_is_equal"] else ["the file's template is not the tokenizer's"]
    faults += [f"{row['name']}: another text" for row in rows if not row["text_is_equal"]]
    faults += [f"{row['name']}: other ids" for row in rows if row["text_is_equal"] and not row["ids_are_equal"]]
    return stated("template", *by_faults(faults, f"{len(rows)} conversations"), {"conversations": rows})


def judge_specials(found: Mapping[str, Any]) -> Finding:
    """BOS, EOS and padding. A tokenizer without a BOS may have one in the file, as long as nothing puts it in."""
    specials = found["specials"]
    wanted, used = specials["tokenizer"], specials["used"]
    faults = [
        f"{name} is {used[name]}, the tokenizer's {wanted[name]}"
        for name in ("bos", "eos", "padding")
        if wanted[name] is not None and used[name] != wanted[name]
    ]
    for name in ("bos", "eos"):
        if specials[f"tokenizer_adds_{name}"] != specials[f"llama_cpp_adds_{name}"]:
            faults.append(
                f"{name} is put in by {'llama.cpp' if specials[f'llama_cpp_adds_{name}'] else 'the tokenizer'} only"
            )
    if wanted["bos"] is None and specials["written"]["bos"] is None:
        faults.append("the file names no BOS, and llama.cpp's own stands for an ordinary word")
    if not specials["eos_ends_a_turn"]:
        faults.append("llama.cpp does not stop at the tokenizer's EOS")
    good = f"ends of turn: {', '.join(specials['ends_of_turn'])}"
    return stated("specials", *by_faults(faults, good), dict(specials))


def judge_modelfile(found: Mapping[str, Any]) -> Finding:
    """The Modelfile beside the files."""
    modelfile = found["modelfile"]
    if modelfile is None:
        return stated("modelfile", "INCOMPLETE", "there is none")
    rows = modelfile["conversations"]
    faults = [] if modelfile["model_exists"] else [f"it is made FROM {modelfile['model']}, which is not there"]
    faults += [] if modelfile["stops_at_eos"] else ["it does not stop at the tokenizer's EOS"]
    faults += [] if rows else ["it has no template"]
    faults += [f"{row['name']}: another text" for row in rows if not row["text_is_equal"]]
    return stated("modelfile", *by_faults(faults, f"{len(rows)} conversations"), dict(modelfile))


def judge_lineage(found: Mapping[str, Any]) -> Finding:
    """``found``: what the probe ``lineage`` printed."""
    links = found["links"]
    faults = [
        f"{link['artefact']}: {link['stated_in']} says {_short(link['stated'])}, found is {_short(link['found'])}"
        for link in links
        if not link["holds"]
    ]
    artefacts = {link["artefact"] for link in links}
    needed = ("corpus, train", "examples, train, made again from the corpus", "base", "adapter")
    faults += [f"no record of {name}" for name in (*needed, "merged weights") if name not in artefacts]
    faults += [] if any(name.endswith(".gguf") for name in artefacts) else ["no GGUF file is named"]
    return stated("lineage", *by_faults(faults, f"{len(links)} links hold"), {"links": links})


def _short(digest: str | None) -> str:
    return "nothing" if digest is None else digest[:12]
