"""Planted faults in what an export holds: merged weights, tokens, templates, Modelfile and digests; each turns red."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.training.system.errors import CheckError, DataError
from forge.training.train.record import completed_record
from harness.export.claims import claim_of
from tests.support.export_answers import assert_red, divergence, entry, file_of, number, patched, verdict_on
from tests.support.tiny_run import edit_json


def tokens(run_dir: Path, gguf: Path) -> Any:
    from harness.export.probes.tokens import compare_tokens

    return compare_tokens(run_dir, gguf, run_dir / "export" / "Modelfile")


def provenance(run_dir: Path) -> Any:
    from harness.export.probes.provenance import trace_provenance

    return trace_provenance(run_dir)


# Merging


def merged_at(run_dir: Path, factor: float, scratch: Path) -> None:
    """Replace the run's merged weights and its f16 file by those of a merge whose scale is off by a factor.

    Converted outside an export, which would refuse the file or merge again.
    """
    from forge.training.adapter.adapter_config import read_adapter_config
    from forge.training.adapter.merge import merge_adapter
    from forge.training.export.gguf import convert_to_gguf

    run = completed_record(run_dir)
    shutil.rmtree(run_dir / "merged")
    adapter = Path(shutil.copytree(run_dir / "adapter", scratch / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(run.base_path, adapter, run_dir / "merged", expected_base_sha256=run.inputs.base_sha256)
    path = run_dir / "merged" / "merge.json"  # the merge says that it was of the run's own configuration
    made = json.loads(path.read_text()) | {
        "adapter_config_sha256": read_adapter_config(run_dir / "adapter").digest(),
    }
    path.write_text(json.dumps(made))
    edit_json(run_dir / "export" / "export.json", merged_sha256=made["merged_sha256"])
    file_of(run_dir, "f16").unlink()
    convert_to_gguf(run_dir / "merged", file_of(run_dir, "f16"), "f16")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("factor", [1.1, 0.5])
def test_a_merge_with_the_wrong_scale_is_red(copy: Path, tmp_path: Path, factor: float) -> None:
    from harness.export.probes.merge import check_merge

    merged_at(copy, factor, tmp_path)
    answer = check_merge(copy)
    assert_red(answer, "merge", r"scaled by [\d.]+, not 2; .*what rounding allows")
    assert answer["fitted_scale"] == pytest.approx(2 * factor, rel=claim_of("merge").bars["scale_tolerance"])
    predicted = divergence(copy, file_of(copy, "f16"))
    assert_red(predicted, "merged_against_adapter", "mean KL")
    assert verdict_on(predicted, "divergence_f16").status == "PASS"  # the file is a true copy of the wrong weights


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_merge_three_per_mille_off_is_red_although_the_predictions_hide_it(copy: Path, tmp_path: Path) -> None:
    from harness.export.probes.merge import check_merge

    merged_at(copy, 1.003, tmp_path)
    answer = check_merge(copy)
    assert_red(answer, "merge", r"scaled by [\d.]+, not 2; ")
    assert answer["fitted_scale"] == pytest.approx(2.006, abs=0.001)
    assert verdict_on(divergence(copy, file_of(copy, "f16")), "merged_against_adapter").status == "PASS"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_adapter_whose_own_configuration_scales_otherwise_than_the_workload_is_red(copy: Path) -> None:
    from forge.training.export.export import export_run
    from harness.export.probes.merge import check_merge

    path = copy / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 64', '"lora_alpha": 128'))
    with pytest.raises(DataError, match="is not what the run trained with"):
        export_run(copy, quantizations=["f16"], force=True)
    assert_red(check_merge(copy), "merge", "configuration scales by 4, the config by 2")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_changed_number_in_an_untouched_tensor_is_red(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    from harness.export.probes.merge import check_merge

    path = copy / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    (copy / "export" / "export.json").unlink()  # whose digest would refuse it first
    assert_red(check_merge(copy), "merge", "1 tensors without an adapter changed, model.norm.weight")


# Tokens, templates, digests


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_special_tokens_and_templates_are_red(run_dir: Path, tmp_path: Path) -> None:
    good = file_of(run_dir, "f16")

    def spoilt(*changes: tuple[bytes, bytes]) -> dict[str, Any]:
        return tokens(run_dir, patched(good, tmp_path / "x.gguf", *changes))

    key = "tokenizer.ggml.eos_token_id"
    answer = spoilt((entry(key, 4, number(4095)), entry(key, 4, number(4094))))
    assert_red(answer, "specials", "eos is 4094, the tokenizer's 4095")
    key = "tokenizer.ggml.add_bos_token"
    answer = spoilt((entry(key, 7, b"\0"), entry(key, 7, b"\1")))
    assert_red(answer, "specials", "bos is inserted by llama.cpp only")
    assert verdict_on(answer, "tokens").status == "FAIL"
    answer = spoilt((b"You are a helpful assistant.", b"You are a hopeful assistant."))
    assert_red(answer, "template", "template is not the tokenizer's; a question: another text")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_modelfile_that_says_something_else_is_red(copy: Path) -> None:
    path, good = copy / "export" / "Modelfile", file_of(copy, "f16")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("You are a helpful assistant.", "You are an assistant."), encoding="utf-8")
    assert_red(tokens(copy, good), "modelfile", "a question: another text")
    path.write_text(text.replace('PARAMETER stop "<|im_end|>"\n', ""), encoding="utf-8")
    assert_red(tokens(copy, good), "modelfile", "does not stop at the tokenizer's EOS")
    path.write_text(text.replace("FROM ./smoke.q4_k_m", "FROM ./absent"), encoding="utf-8")
    assert_red(tokens(copy, good), "modelfile", "which is not there")
    path.write_text(text.replace("TEMPLATE", "TEMPLET"), encoding="utf-8")
    with pytest.raises(CheckError, match="did you mean template"):
        tokens(copy, good)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("corpus.train.jsonl", "corpus, train: run.json says"),
        ("export/smoke.q4_k_m.gguf", "smoke.q4_k_m.gguf: export.json says"),
        ("export/Modelfile", "Modelfile: SHA256SUMS says"),
        ("adapter/adapter_model.safetensors", "adapter: run.json says"),
    ],
)
def test_one_changed_byte_breaks_the_chain(copy: Path, name: str, because: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-9] ^= 1
    (copy / name).write_bytes(content)
    assert_red(provenance(copy), "provenance", because)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_file_that_no_record_names_breaks_the_chain(copy: Path) -> None:
    shutil.copyfile(file_of(copy, "f16"), copy / "export" / "other.gguf")
    assert_red(provenance(copy), "provenance", "other.gguf: SHA256SUMS says nothing")


@pytest.mark.slow
def test_the_real_qwen2_vocabulary_is_read_alike_but_for_one_ordinary_text_and_a_wrong_pre_tokenizer_is_red(
    tmp_path: Path,
) -> None:
    from forge.training.export.gguf import convert_to_gguf
    from forge.training.models.qwen2 import Shape, write_configs, write_random
    from forge.training.models.tokenizers import CONTROL_TOKENS, rebuild_qwen2_tokenizer, save_tokenizer
    from harness.export.probes.tokens import compare_tokens
    from tests.support.tiny_run import write_run

    base, shape = tmp_path / "base", Shape(64, 64, 1, 1, 1, 152064, 1024)
    base.mkdir()
    tokenizer = rebuild_qwen2_tokenizer()
    save_tokenizer(tokenizer, base, shape.max_position_embeddings)
    write_configs(shape, {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}, base)
    write_random(shape, base, seed=1, say=print)
    convert_to_gguf(base, tmp_path / "x.gguf")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").touch()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": False}
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    write_run(tmp_path / "run", base)
    answer = compare_tokens(tmp_path / "run", tmp_path / "x.gguf")
    for claim in ("tokens", "template", "specials"):
        verdict = verdict_on(answer, claim)
        assert verdict.status == "PASS", verdict.reason
    assert answer["specials"]["ordinary_text_that_ends_a_turn"] == ["</s>"]
    counts = {
        mode: sum(row["num_end_of_turn"] for row in result["by_kind"].values())
        for mode, result in answer["strings"].items()
    }
    assert 0 < counts["control tokens named"] < 10
    assert counts["plain text"] == 0
    # and with the pre-tokenizer of another model, on the vocabulary that the gate's own bases have
    key, length = "tokenizer.ggml.pre", (5).to_bytes(8, "little")
    change = (entry(key, 8, length + b"qwen2"), entry(key, 8, length + b"gpt-2"))
    wrong = compare_tokens(tmp_path / "run", patched(tmp_path / "x.gguf", tmp_path / "wrong.gguf", change))
    assert_red(wrong, "tokens", r"control tokens named: \d+ of \d+ strings differ")
