"""The contract of export/: every variant of every exporter makes a folder that is complete, that its runtime opens, and that answers."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PhiConfig, PhiForCausalLM

from helpers.exporting import ROWS, changed_config, exported, job_of, kl, recipe_of
from helpers.paths import TESTS
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, MissingExtra, ModelError, NotDeployable
from qkit.export import stage as export_stage
from qkit.export._vllm.compressed import GROUPS, group_size, left_in_16_bit, quantization_config
from qkit.model import provenance
from qkit.plugins.exporter import exporter
from qkit.plugins.runtime import RowScores, open_runtime
from qkit.recipe.registry import format_names, split
from qkit.runtimes import vllm as server
from qkit.setup import side_environments
from qkit.tensors.companions import copy_companions

OWN_TEST = ("onnx",)  # made by a program that takes its time: tests/export/test_onnx.py has the same contract
FORMATS = [name for name in format_names() if split(name)[0] not in OWN_TEST]
WHOLE = [name for name in FORMATS if name != "vllm-adapter"]
# Mean KL to the merged model that rounding explains, on random weights, which suffer more than trained ones.
LIMITS = {
    **dict.fromkeys(("safetensors", "vllm"), 1e-9),
    **dict.fromkeys(("safetensors-fp16", "gguf-f16"), 2e-3),
    "gguf-q8_0": 0.01,
    "vllm-w8a8": 0.02,
    "vllm-fp8": 0.1,
}
ROUGH = 0.8  # of 4 bit; weights that were mixed up give 5 and more


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(folder))
    provenance.write_adapter_note(folder, tiny_model, recipe_of(tiny_model), [])
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every format."""
    root = tmp_path_factory.mktemp("exports")
    job = job_of(tiny_model, root, adapter)
    return {name: exported(job, name, root) for name in FORMATS}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> list[RowScores]:
    with open_runtime("transformers", tiny_model, detect()) as opened:
        return list(opened.score(ROWS))


@pytest.mark.parametrize("name", FORMATS)
def test_the_folder_is_complete(folders: dict[str, Path], tiny_model: Path, name: str) -> None:
    folder = folders[name]
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for file in beside:
        assert (folder / file).read_bytes() == (tiny_model / file).read_bytes(), file
    weights = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")]
    assert weights and (folder / "config.json").is_file() is (name != "vllm-adapter")
    assert all(path.stat().st_mode & 0o600 == 0o600 for path in folder.iterdir())


@pytest.mark.parametrize("name", WHOLE)
def test_it_opens_and_answers_as_the_merged_model_does(
    folders: dict[str, Path], reference: list[RowScores], name: str
) -> None:
    """Those for vLLM in transformers, which reads the same format; tests/test_pipeline.py starts vLLM."""
    with open_runtime("transformers", folders[name], detect()) as opened:
        distance = kl(reference, list(opened.score(ROWS)))
        (answer,) = opened.generate([[5, 6, 7]], 4, frozenset())
    assert len(answer) == 4
    assert -1e-6 < distance < LIMITS.get(name, ROUGH)


def test_what_is_called_quantized_is_smaller(folders: dict[str, Path]) -> None:
    """Embeddings and head, a third of this model, stay as they are."""
    sizes = {name: sum(p.stat().st_size for p in folders[name].glob("model*")) for name in WHOLE}
    for name in WHOLE:
        kind, variant = split(name)
        whole = sizes["gguf-f16" if kind == "gguf" else "safetensors"]
        assert (sizes[name] < 0.75 * whole) is (variant in exporter(name).QUANTIZED), (name, sizes[name] / whole)


@pytest.mark.parametrize("name", FORMATS)
def test_it_says_how_it_was_made(folders: dict[str, Path], name: str) -> None:
    note = json.loads((folders[name] / "qkit.json").read_text()) if (folders[name] / "qkit.json").is_file() else {}
    if split(name)[0] == "vllm" and split(name)[1] in exporter(name).QUANTIZED:
        assert note["method"] == "round-to-nearest"
    if name == "vllm-adapter":
        assert len(note["base_fingerprint"]) == 64 and note["max_lora_rank"] == 8


@pytest.mark.parametrize("kind", sorted({split(name)[0] for name in FORMATS}))
def test_an_unknown_variant_names_the_known_ones(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    known = [name for name in FORMATS if split(name)[0] == kind]
    with pytest.raises(NotDeployable, match=known[-1]) as caught:
        exporter(kind).export(job_of(tiny_model, tmp_path), tmp_path / "out", "int3")
    assert caught.value.export_format == f"{kind}-int3"
    assert not (tmp_path / "out").exists()


# --- one by one -------------------------------------------------------------------------------------------------------


def copied(tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["safetensors-fp16", "gguf-f16"])
@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_what_float16_cannot_hold_is_named(tiny_model: Path, tmp_path: Path, name: str, value: float) -> None:
    folder = copied(tiny_model, tmp_path, lambda w: w["model.layers.1.mlp.up_proj.weight"][0].fill_(value))
    with pytest.raises(NotDeployable, match=r"model\.layers\.1\.mlp\.up_proj\.weight has the value"):
        exported(job_of(folder, tmp_path), name, tmp_path)


def test_several_shards_hold_the_same_tensors(tiny_model: Path, tmp_path: Path) -> None:
    job = job_of(tiny_model, tmp_path, merge={"base": "dequantized", "max_shard_bytes": 40_000})
    folder = exported(job, "safetensors-fp16", tmp_path)
    parts = [load_file(part) for part in sorted(folder.glob("*.safetensors"))]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(parts) > 2 and set(index.values()) == {part.name for part in folder.glob("*.safetensors")}
    whole = load_file(tiny_model / "model.safetensors")
    assert {name for part in parts for name in part} == whole.keys() == index.keys()
    assert all(torch.equal(t, whole[n].half()) for part in parts for n, t in part.items())


def test_rounding_to_the_nearest_is_that(folders: dict[str, Path], tiny_model: Path) -> None:
    """No weight is further from its own than half a step, computed here by hand."""
    name = "model.layers.0.self_attn.q_proj"
    weight = load_file(tiny_model / "model.safetensors")[f"{name}.weight"].float()
    stored = load_file(folders["vllm-w8a8"] / "model.safetensors")
    scale = stored[f"{name}.weight_scale"].float()
    assert stored[f"{name}.weight"].dtype == torch.int8 and scale.shape == (64, 1)
    assert ((stored[f"{name}.weight"].float() * scale - weight).abs() <= 0.502 * scale).float().mean() > 0.99
    packed = load_file(folders["vllm-w4a16"] / "model.safetensors")
    assert packed[f"{name}.weight_shape"].tolist() == [64, 64]
    nibbles = torch.stack([(packed[f"{name}.weight_packed"] >> 4 * i) & 15 for i in range(8)], -1).reshape(64, 64) - 8
    steps = packed[f"{name}.weight_scale"].float().repeat_interleave(64 // packed[f"{name}.weight_scale"].shape[1], 1)
    assert ((nibbles * steps - weight).abs() <= 0.6 * steps).float().mean() > 0.99


@pytest.mark.parametrize(
    ("hidden", "intermediate", "size"), [(4096, 11008, 128), (576, 1536, 64), (64, 96, 32), (48, 96, None)]
)
def test_the_group_divides_every_matrix(hidden: int, intermediate: int, size: int | None) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "vocab_size": 8}
    config = {"model_type": "llama", "num_attention_heads": 1, **sizes}
    if size is None:
        with pytest.raises(ModelError, match=f"48, 96 inputs, which cannot be divided into groups of {GROUPS[0]}"):
            group_size(config)
    else:
        assert group_size(config) == size


def test_without_its_environment_gptq_is_refused_and_auto_says_what_it_does(tiny_model: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    job = job_of(tiny_model, tmp_path, export={"method": "gptq"})
    with pytest.raises(MissingExtra, match="qkit doctor --make llmcompressor"):
        exported(job, "vllm-w4a16", tmp_path)
    shutil.rmtree(tmp_path / "vllm-w4a16")
    job = replace(job_of(tiny_model, tmp_path, export={"method": "auto"}), notify=messages.append)
    exported(job, "vllm-w4a16", tmp_path)
    assert "qkit doctor --make llmcompressor" in messages[0]


def test_an_adapter_is_started_on_its_base_and_on_no_other(
    folders: dict[str, Path], tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["vllm-adapter"], tmp_path / "adapter")
    argv = server.argv(folder, "mine", recipe_of(tiny_model).serve, 8001, detect())
    pairs = dict(itertools.pairwise(argv))
    assert pairs["--model"] == str(tiny_model.resolve()) and pairs["--max-lora-rank"] == "8"
    assert pairs["--lora-modules"] == f"mine={folder}" and pairs["--served-model-name"] == "mine-base"
    assert pairs["--generation-config"] == str(folder) and "--enable-lora" in argv
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other_model)}))
    with pytest.raises(ModelError, match="was trained on"):
        server.argv(folder, "mine", recipe_of(tiny_model).serve, 8001, detect())


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 600}, {"trainable_token_indices": [1]}]
)
def test_an_adapter_that_vllm_refuses(tiny_model: Path, adapter: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    other = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(NotDeployable, match="vLLM does not serve this adapter"):
        exported(job_of(tiny_model, tmp_path, other), "vllm-adapter", tmp_path)


# --- what is left as it was ---------------------------------------------------------------------------------------------


def _saved(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_matrices_that_are_not_quantized_are_named_to_the_loaders(tmp_path: Path) -> None:
    """Phi's are called otherwise: unnamed they would be looked for in 8 bit, with scales that nobody wrote."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi = _saved(PhiForCausalLM(PhiConfig(vocab_size=64, **sizes)), tmp_path / "phi")
    left = left_in_16_bit(phi)
    assert {name.rpartition(".")[2] for name in left} == {"lm_head", "fc1", "fc2", "dense"}
    config = json.loads((phi / "config.json").read_text())
    assert quantization_config("w8a8", config, left)["ignore"] == left
    neox = _saved(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, **sizes)), tmp_path / "neox")
    with pytest.raises(ModelError, match="use vllm"):
        left_in_16_bit(neox)


@pytest.mark.parametrize(
    ("names", "share"),
    [(["vllm"], 0), (["vllm", "onnx-fp32"], 4), (["onnx-fp32", "onnx-int4", "vllm-w4a16"], 5.4), (["gguf-q8_0"], 0.7)],
)
def test_disk_is_asked_for_by_what_is_made(names: list[str], share: float) -> None:
    """Links to the merged weights of a 7B were refused for want of 45 GB."""
    assert export_stage.disk_share(names) == pytest.approx(share)


def test_what_a_training_left_beside_the_weights_goes_nowhere(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_model, tmp_path / "checkpoint-8")
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "tf_model.h5", "flax_model.msgpack"):
        (checkpoint / name).write_bytes(b"large")
    (tmp_path / "out").mkdir()
    copy_companions(checkpoint, tmp_path / "out")
    beside = {file.name for file in tiny_model.iterdir() if file.suffix != ".safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == beside - {"README.md"}


# --- nothing half looks whole -----------------------------------------------------------------------------------------

CHILD = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.exporting import exported, job_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
job = job_of(Path({model!r}), Path({root!r}))
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
exported(job, {name!r}, Path({root!r}))
"""


def child(model: Path, root: Path, name: str, limit: int) -> list[str]:
    code = CHILD.format(tests=str(TESTS), model=str(model), root=str(root), name=name, limit=limit)
    return [sys.executable, "-c", code]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits files by the system")
@pytest.mark.parametrize("name", ["safetensors-fp16", "gguf-f16"])
def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """The system refuses to let a file grow beyond 60 kB: half a model."""
    done = subprocess.run(child(tiny_model, tmp_path, name, 60_000), capture_output=True, text=True)
    assert done.returncode and os.strerror(errno.EFBIG if name == "safetensors-fp16" else errno.ENOSPC) in done.stderr
    assert not (tmp_path / name / "config.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tiny_model: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        exported(job_of(tiny_model, tmp_path), "safetensors", locked)


def test_a_file_in_the_way(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf-f16").write_text("")
    with pytest.raises(FileExistsError):
        exported(job_of(tiny_model, tmp_path), "gguf-f16", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path, tiny_model: Path) -> None:
    """A model of a few hundred MB, so that there is a half to be killed at."""
    big = shutil.copytree(tiny_model, tmp_path / "big")
    weights = load_file(big / "model.safetensors")
    more = {f"model.extra.{i}": torch.zeros(2048, 2048, dtype=torch.bfloat16) for i in range(40)}
    save_file({**weights, **more}, big / "model.safetensors", {"format": "pt"})
    process = subprocess.Popen(child(big, tmp_path, "safetensors-fp16", 0), stderr=subprocess.DEVNULL)
    part = tmp_path / "safetensors-fp16" / "model.safetensors"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 1 << 20):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was through before it could be killed"
    assert not (part.parent / "config.json").exists() and not (part.parent / "qkit.json").exists()


def test_a_model_without_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tiny_model / "config.json", empty)
    with pytest.raises(ModelError, match="contains no model"):
        exported(job_of(empty, tmp_path), "safetensors", tmp_path)
    with pytest.raises(MissingArtifact, match="not an adapter"):
        exported(job_of(tiny_model, tmp_path, empty), "vllm-adapter", tmp_path)
    changed_config(empty, model_type="gpt_neox")
    with pytest.raises(NotDeployable, match="'gpt_neox' is not supported"):
        exported(job_of(empty, tmp_path), "gguf-f16", tmp_path)


# --- llm-compressor, of which a stand-in is started: the real one lives in an environment of its own -------------------

STAND_IN = """#!/bin/sh
exec {python} -c "
import json, pathlib, sys
job = json.loads(sys.argv[-1])
if job['samples'] == 3:
    sys.exit('no such row')
out = pathlib.Path(job['out'])
(out / 'model.safetensors').write_bytes((pathlib.Path(job['model']) / 'model.safetensors').read_bytes())
(out / 'config.json').write_text(json.dumps(dict(quantization_config=job['scheme'], other_version=1)))
(out / 'recipe.yaml').write_text(' '.join(sys.argv[1:-1]))
" "$@"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(side_environments, "python_of", lambda name: program)


@pytest.mark.parametrize(("variant", "bits"), [("w4a16", 4), ("w8a8", 8)])
def test_gptq_is_given_the_rows_and_its_scheme_is_kept(
    stand_in: None, tiny_model: Path, tmp_path: Path, variant: str, bits: int
) -> None:
    job = job_of(tiny_model, tmp_path, export={"method": "auto", "calibration_rows": 2})
    folder = exported(job, f"vllm-{variant}", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["weights"]["num_bits"] == bits
    assert config["model_type"] == "llama" and "other_version" not in config and not (folder / "recipe.yaml").exists()
    note = json.loads((folder / "qkit.json").read_text())
    assert (note["method"], note["calibration_rows"], note["made_by"]) == ("gptq", 2, ["llmcompressor==0.14.0"])


def test_a_failed_calibration_says_why(stand_in: None, tiny_model: Path, tmp_path: Path) -> None:
    job = job_of(tiny_model, tmp_path, export={"method": "awq", "calibration_rows": 3})
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1; export.method=round-to-nearest.*no such row"):
        exported(job, "vllm-w4a16", tmp_path)


def test_floats_of_8_bit_need_no_rows(stand_in: None, tiny_model: Path, tmp_path: Path) -> None:
    folder = exported(job_of(tiny_model, tmp_path, export={"method": "auto"}), "vllm-fp8", tmp_path)
    assert json.loads((folder / "qkit.json").read_text())["method"] == "round-to-nearest"


def test_the_program_imports_nothing_of_qkit() -> None:
    from qkit.export.formats.vllm import PROGRAM

    argv = [
        sys.executable,
        "-I",
        "-c",
        f"import runpy; runpy.run_path({str(PROGRAM)!r}); import sys; print(*sys.modules)",
    ]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert "qkit" not in loaded and "torch" not in loaded
