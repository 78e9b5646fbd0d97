"""What `check` knows before hours are spent: every fault planted here is found, all at once, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from forge.training.backends import Backend
from forge.training.checks import machine, packages
from forge.training.checks.check import Finding, check_workload, exit_code, print_findings
from forge.training.checks.machine import check_disk, check_gpu, check_memory
from forge.training.checks.model import check_export, find_base
from forge.training.config.workload import Workload, load_workload
from forge.training.models.weights import read_weights
from forge.training.planner.sizes import Sizes
from forge.training.system.environment import ROOT
from forge.training.system.errors import ConfigurationError, GpuMemoryError, MachineError
from forge.training.train import run
from tests.support.tiny_model import write_base

GPU: dict[str, Any] = {
    "name": "NVIDIA GeForce RTX 3070",
    "driver": "580.1",
    "driver_cuda": "13.0",
    "compute_capability": "8.6",
    "memory_total_bytes": 8 << 30,
    "memory_free_bytes": 7 << 30,
    "num_other_processes": 0,
    "throttle_reasons": ["idle"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    directory = tmp_path_factory.mktemp("base")
    given = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size, threads that wait for each other cost ten times more than they save
    write_base(directory, tied=False)
    torch.set_num_threads(given)
    return directory


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def write_corpus(path: Path, *answers: str) -> str:
    lines = [json.dumps({"instruction": "Recite", "input": "", "output": answer}) for answer in answers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def workload(folder: Path, base: Path | str, **changes: dict[str, Any]) -> Workload:
    data = {
        "train": write_corpus(folder / "train.jsonl", "one", "two"),
        "validation": write_corpus(folder / "validation.jsonl", "three"),
        "max_length": 256,
    }
    content: dict[str, Any] = {"name": "w", "model": {"path": str(base)}, "data": data, "report_to": []}
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values
    return Workload.model_validate(content)


def said(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{f.subject}: {f.message} -> {f.remedy}" for f in findings if f.level == level)


def test_a_sound_workload_has_no_error(base: Path, tmp_path: Path) -> None:
    findings = check_workload(workload(tmp_path, base), "trl", tmp_path)
    assert said(findings, "error") == ""
    assert exit_code(findings) == 0
    subjects = {finding.subject for finding in findings}
    assert {"plan", "data", "model", "tokenizer", "memory", "disk", "export", "GPU", "llama.cpp"} <= subjects


def test_every_error_is_reported_at_once_and_the_first_gives_the_exit_code(base: Path, tmp_path: Path) -> None:
    bad = workload(
        tmp_path,
        base,
        model={"quantization": "nf4"},
        data={"train": str(tmp_path / "absent.jsonl"), "max_length": 4096},
        lora={"targets": ["q_porj"]},
        optimizer={"name": "paged_adamw_8bit"},
        export={"quantizations": ["q8_0"]},
    )
    findings = check_workload(bad, "unsloth", tmp_path)
    text = said(findings, "error")
    for fault in ("float32", "absent.jsonl does not exist", "512 positions", "not installed: ", "need a CUDA GPU"):
        assert fault in text
    assert exit_code(findings) == 2
    assert exit_code([f for f in findings if f.subject == "data"]) == 3
    assert exit_code([f for f in findings if f.subject == "GPU"]) == 4
    assert all(f.remedy for f in findings if f.level == "error")


def test_lora_targets_that_the_base_lacks_are_named(base: Path, tmp_path: Path) -> None:
    findings = check_workload(workload(tmp_path, base, lora={"targets": ["q_porj", "v_proj"]}), "trl", tmp_path)
    assert "no module q_porj" in said(findings, "error")
    assert "gate_proj, k_proj" in said(findings, "error")


def test_torch_is_not_imported_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(workload(tmp_path, "tiny").to_yaml(), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from forge.training.checks.check import check_workload;"
        "from forge.training.config.workload import load_workload;"
        "found = check_workload(load_workload(sys.argv[1]), 'trl');"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy;"
        "print([f.message for f in found if f.level == 'error'])"
    )
    environment = {**os.environ, "FORGE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "w.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama.cpp" in done.stdout  # not in that cache
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_one_json_document_and_ends_with_the_first_errors_code(base: Path, tmp_path: Path) -> None:
    bad = workload(tmp_path, base, data={"train": write_corpus(tmp_path / "bad.jsonl", "one") + "x"})
    (tmp_path / "w.yaml").write_text(bad.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "forge.training", "check", str(tmp_path / "w.yaml"), "--backend", "trl", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    levels = {row["level"] for row in json.loads(done.stdout)}
    assert levels >= {"ok", "error"}


def test_broken_and_empty_data_are_errors_and_shared_texts_a_warning(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n', encoding="utf-8")
    assert "line 2" in said(
        check_workload(workload(tmp_path, base, data={"train": str(broken)}), "trl", tmp_path), "error"
    )
    broken.write_text("\n", encoding="utf-8")
    assert "no records" in said(
        check_workload(workload(tmp_path, base, data={"train": str(broken)}), "trl", tmp_path), "error"
    )
    shared = write_corpus(tmp_path / "shared.jsonl", "three", " two\n")
    findings = check_workload(workload(tmp_path, base, data={"validation": shared}), "trl", tmp_path)
    assert "1 of 2 held-out texts" in said(findings, "warning")


def test_the_faults_of_both_files_near_copies_and_credentials_are_told(base: Path, tmp_path: Path) -> None:
    broken = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in broken:
        path.write_text("{}\n", encoding="utf-8")
    both = {"train": str(broken[0]), "validation": str(broken[1])}
    text = said(check_workload(workload(tmp_path, base, data=both), "trl", tmp_path), "error")
    assert "a.jsonl: 1 line" in text
    assert "b.jsonl: 1 line" in text
    words = " ".join(f"word{i}" for i in range(60))
    token = "ghp_" + "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIo"
    near = {
        "train": write_corpus(tmp_path / "c.jsonl", "one", words, f"the key is {token}"),
        "validation": write_corpus(tmp_path / "d.jsonl", words + " more"),
    }
    findings = check_workload(workload(tmp_path, base, data=near), "trl", tmp_path)
    assert "1 of 1 held-out texts are nearly trained ones: line 1 is 98% line 2" in said(findings, "warning")
    assert "credentials: line 3: GitHub Token" in said(findings, "warning")
    assert token[6:] not in repr(findings)
    assert exit_code(findings) == 0


def test_evaluation_without_held_out_records_is_an_error(base: Path, tmp_path: Path) -> None:
    none_held_out = {"validation": None, "validation_share": 0}
    findings = check_workload(
        workload(tmp_path, base, data=none_held_out, training={"evaluate_every_steps": 5}), "trl", tmp_path
    )
    assert "no validation set" in said(findings, "error")
    findings = check_workload(workload(tmp_path, base, data=none_held_out), "trl", tmp_path)
    assert "forge evaluate" in said(findings, "warning")


def test_a_run_that_is_never_saved_is_a_warning(base: Path, tmp_path: Path) -> None:
    never = workload(tmp_path, base, training={"save_every_minutes": None})
    assert "save_every_minutes" in said(check_workload(never, "trl", tmp_path), "warning")
    assert "save_every_minutes" not in said(check_workload(workload(tmp_path, base), "trl", tmp_path), "warning")


def test_documents_are_counted_and_a_missing_folder_is_an_error(base: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    given = {"train": None, "validation": None, "documents": str(docs)}
    assert "no directory" in said(check_workload(workload(tmp_path, base, data=given), "trl", tmp_path), "error")
    docs.mkdir()
    (docs / "a.md").write_text("# A\n", encoding="utf-8")
    assert "1 file to read, 2 needed" in said(
        check_workload(workload(tmp_path, base, data=given), "trl", tmp_path), "error"
    )
    (docs / "b.md").write_text("# B\n", encoding="utf-8")
    assert "2 files in" in said(check_workload(workload(tmp_path, base, data=given), "trl", tmp_path), "ok")


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "changes", "fault"),
    [
        ("config.json", {"vocab_size": 100}, "only 100 rows"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
        ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ("tokenizer_config.json", {"eos_token": None}, "no eos token"),
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}, "'<|gone|>'"),
        ("tokenizer_config.json", {"vocab_file": "../../.env"}, "leaves the model's folder"),
    ],
)
def test_faults_of_the_base_are_found(
    own_base: Path, tmp_path: Path, file: str, changes: dict[str, Any], fault: str
) -> None:
    edit_json(own_base / file, **changes)
    findings = check_workload(workload(tmp_path, own_base), "trl", tmp_path)
    assert fault in said(findings, "error")


def test_a_base_without_template_or_with_a_broken_tokenizer_or_shard_is_found(own_base: Path, tmp_path: Path) -> None:
    (own_base / "chat_template.jinja").unlink()
    assert "no chat template" in said(check_workload(workload(tmp_path, own_base), "trl", tmp_path), "error")
    (own_base / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "not a usable tokenizer" in said(check_workload(workload(tmp_path, own_base), "trl", tmp_path), "error")
    weights = own_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    findings = check_workload(workload(tmp_path, own_base), "trl", tmp_path)
    assert "model.safetensors has" in said(findings, "error")
    assert "tokenizer" not in {finding.subject for finding in findings}  # nothing is judged by a base that is none


def test_padding_with_the_end_token_is_a_warning(own_base: Path, tmp_path: Path) -> None:
    edit_json(own_base / "tokenizer_config.json", pad_token="<|im_end|>")
    findings = check_workload(workload(tmp_path, own_base), "trl", tmp_path)
    assert "pads with <|im_end|>" in said(findings, "warning")


def test_a_quantisation_that_would_fall_back_in_silence_is_found(own_base: Path, tmp_path: Path) -> None:
    weights = read_weights(own_base)
    odd = {n: t.__class__(t.name, t.dtype, (t.shape[0], 250), 0, 0) for n, t in weights.tensors.items() if t.shape[1:]}
    narrow = weights.__class__(weights.directory, weights.config, weights.shards, odd)
    asked = workload(tmp_path, own_base, export={"quantizations": ["f16", "q4_k_m"]})
    findings = list(check_export(asked, narrow))
    assert [finding.level for finding in findings] == ["error"]
    assert "q4_k_m needs rows of a multiple of 256" in findings[0].message
    assert [f.level for f in check_export(asked, weights)] == ["ok"]


def test_a_hub_name_offline_is_an_error_and_online_a_warning(tmp_path: Path) -> None:
    def check(offline: bool) -> list[Finding]:
        asked = workload(tmp_path, "nobody/nothing-of-that-name", model={"offline": offline})
        return check_workload(asked, "trl", tmp_path)

    assert "nobody/nothing-of-that-name" in said(check(True), "error")
    online = check(False)
    assert "will be fetched" in said(online, "warning")
    assert "nobody" not in said(online, "error")


def test_a_standin_not_made_yet_is_judged_by_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    base, findings = find_base(workload(tmp_path, "qwen2-7b"), has_gpu=False)
    assert base is not None
    assert base.num_parameters == 7_615_616_512  # Qwen2-7B's own count
    assert "will be made" in findings[0].message
    with pytest.raises(MachineError, match="trained on a GPU"):
        find_base(workload(tmp_path, "small"), has_gpu=False)
    assert not (tmp_path / "cache").exists()


def test_the_legacy_stack_is_refused_in_another_interpreter(base: Path, tmp_path: Path) -> None:
    text = said(check_workload(workload(tmp_path, base), "legacy", tmp_path), "error")
    assert "not the legacy stack" in text
    assert "(pinned 0.26.2)" in text
    assert "requirements-legacy.txt" in text


@pytest.mark.parametrize(
    ("backend", "plan", "named"),
    [
        ("unsloth", "{}", "model.dtype=float32"),
        (
            "trl",
            "{gradient_checkpointing: offload, loss_chunk_gib: 1.0}",
            "checkpointing=offload, plan.loss_chunk_gib=1",
        ),
        ("legacy", "{mlp_tile_tokens: 8192}", "plan.mlp_tile_tokens=8192"),
        ("legacy", "{padding: none}", "plan.padding=none"),
    ],
)
def test_what_a_backend_cannot_do_is_found_and_train_refuses_it_before_it_does_anything(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, plan: str, named: str
) -> None:
    (tmp_path / "w.plans.yaml").write_text(f"{backend}: {plan}\n", encoding="utf-8")
    (tmp_path / "w.yaml").write_text(workload(tmp_path, base).to_yaml(), encoding="utf-8")
    asked = load_workload(tmp_path / "w.yaml")
    (finding,) = [f for f in check_workload(asked, backend, tmp_path) if f.subject == "backend"]
    assert named in finding.message
    assert finding.exit_code == 2
    listener = run.Listener(lambda _: None, lambda *_: None, lambda *_: None)
    with pytest.raises(ConfigurationError) as caught:
        run.train(asked, backend, [], tmp_path / "run", listener)
    assert (caught.value.message, caught.value.remedy) == (finding.message, finding.remedy)
    assert not (tmp_path / "run").exists()


def test_versions_below_the_security_floor_are_errors_except_in_the_legacy_stack(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"transformers": "4.57.3", "torch": "2.5.1+cu124", "jinja2": "3.1.5"}
    real = packages.package_version
    monkeypatch.setattr(packages, "package_version", lambda name: old.get(name) or real(name))
    found = list(packages.check_packages(workload(tmp_path, base), "trl", has_gpu=False))
    assert "transformers 4.57.3 is below 5.3" in said(found, "error")
    assert "torch 2.5.1+cu124 is below 2.6" in said(found, "error")
    assert "jinja2 3.1.5 is below 3.1.6 (CVE-2025-27516" in said(found, "error")
    assert "torch 2.5.1+cu124 (pinned" in said(found, "warning")
    found = list(packages.check_packages(workload(tmp_path, base), "legacy", has_gpu=True))
    assert "transformers 4.57.3 is below 5.3" in said(found, "warning")


def test_an_8_gb_card_is_told_what_does_not_fit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    shape = {"model": {"quantization": "nf4", "dtype": "bfloat16"}, "optimizer": {"name": "paged_adamw_8bit"}}
    qlora = workload(tmp_path, "qwen2-7b", **shape)
    weights, _ = find_base(qlora, has_gpu=True)
    assert weights is not None
    assert [f.level for f in check_memory(qlora, weights, GPU)] == ["ok"]
    tight = list(check_memory(qlora, weights, GPU | {"memory_free_bytes": 5 << 30}))
    assert tight[0].level == "warning"
    whole = workload(tmp_path, "qwen2-7b", model={"dtype": "bfloat16"})
    with pytest.raises(GpuMemoryError, match=r"1\d\.\d\d GiB, 7\.00 GiB of GPU memory are free"):
        list(check_memory(whole, weights, GPU))


def test_the_memory_floor_of_qwen2_7b_in_nf4_is_the_published_one() -> None:
    config = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    gib = Sizes.of(load_workload("legacy_256"), config).floor_bytes / 2**30
    assert 5.3 < gib < 5.6  # 3.14 linears + 2.03 embedding and head + 0.24 adapter, computed by hand


def test_what_the_gpu_lacks_is_said(base: Path, tmp_path: Path) -> None:
    asked = workload(tmp_path, base, model={"dtype": "bfloat16"})
    crowded = GPU | {"num_other_processes": 2, "throttle_reasons": ["thermal, hardware"], "compute_capability": "7.5"}
    findings = list(check_gpu(asked, "trl", crowded))
    assert "2 other processes" in said(findings, "warning")
    assert "slowed down: thermal" in said(findings, "warning")
    assert "has no bfloat16" in said(findings, "error")
    assert "bfloat16" not in said(list(check_gpu(asked, "trl", GPU)), "error")


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_an_error_with_both_numbers(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: _Usage(1, 1, 1_000_000))
    (finding,) = check_disk(workload(tmp_path, base), read_weights(base), tmp_path)
    assert finding.level == "error"
    assert finding.exit_code == 6
    assert "0.1 GB" in finding.message


def test_a_tracker_that_is_not_installed_is_an_error(base: Path, tmp_path: Path) -> None:
    asked = workload(tmp_path, base).model_copy(update={"report_to": ("neptune",)})
    assert "neptune is not installed" in said(check_workload(asked, "trl", tmp_path), "error")


def test_findings_are_printed_one_a_line_with_their_remedy() -> None:
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    findings = [Finding("ok", "data", "3 records"), Finding("error", "GPU", "none [here]", "buy one", 4)]
    print_findings(findings, console)
    assert console.export_text().splitlines() == [
        "ok       data  3 records",
        "error    GPU   none [here]",
        "               -> buy one",
        "1 ok, 0 warnings, 1 error",
    ]


@pytest.mark.gpu
def test_a_gpu_machine_with_the_pinned_stack_passes(tmp_path: Path) -> None:
    shape = {"model": {"quantization": "nf4", "dtype": "bfloat16"}, "optimizer": {"name": "paged_adamw_8bit"}}
    findings = check_workload(workload(tmp_path, "qwen2-7b", **shape), "unsloth", tmp_path)
    assert said(findings, "error") == ""
    assert {"attention", "PyTorch"} <= {finding.subject for finding in findings}
