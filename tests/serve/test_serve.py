"""`qkit serve` before anything is started: what it picks, what it refuses, what it prints, and how long that takes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.command import qkit
from helpers.sample import a_run, edit
from qkit.core.device import Device
from qkit.core.errors import (
    DoesNotFit,
    MissingArtifact,
    ModelError,
    NotDeployable,
    ParityFailed,
    QkitError,
    ServerError,
)
from qkit.model.provenance import write_adapter_note
from qkit.plan.sheet import Options, recipe_for
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.runtimes import vllm
from qkit.serve import fits, lifecycle
from qkit.serve import serving as serve_serving
from qkit.serve.request import ServeOptions, Serving
from qkit.server import process
from qkit.server.adapters import checked, parse
from qkit.server.lora import rank_for

CPU = Device("cpu", "a CPU", 24 << 30, 2)


# --- what is picked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "asked", "picked"),
    [
        ({"vllm": "measured", "onnx_fp32": "measured"}, ServeOptions(), "vllm"),
        (
            {"onnx_fp32": "measured", "onnx_int4": "measured"},
            ServeOptions("onnxruntime"),
            "onnx-fp32",
        ),  # the nearer one
        ({"onnx_fp32": "failed", "onnx_int4": "passed"}, ServeOptions("onnxruntime"), "onnx-int4"),
        ({"onnx_fp32": "measured", "onnx_int4": "passed"}, ServeOptions("onnxruntime"), "onnx-int4"),
        ({"onnx_fp32": "passed", "onnx_int4": "passed"}, ServeOptions("onnxruntime", "onnx-int4"), "onnx-int4"),
        ({"vllm": "failed"}, ServeOptions(force=True), "vllm"),
        ({"vllm_adapter": "passed", "vllm": "measured"}, ServeOptions(), "vllm"),  # apart it is slower
        ({"vllm_adapter": "passed", "vllm": "passed"}, ServeOptions(artifact="vllm-adapter"), "vllm-adapter"),
        ({"vllm_adapter": "passed"}, ServeOptions(), "vllm-adapter"),
    ],
)
def test_the_best_that_passed_its_gate(
    tmp_path: Path, statuses: dict[str, str], asked: ServeOptions, picked: str
) -> None:
    artifact, why = serve_serving.pick(a_run(tmp_path, **statuses), asked)
    assert artifact.name == picked and picked in why


@pytest.mark.parametrize(("rule", "picked"), [("fidelity", "vllm"), ("score", "vllm-w8a8")])
def test_the_nearest_and_not_the_luckiest(tmp_path: Path, rule: str, picked: str) -> None:
    run = a_run(tmp_path, vllm="passed", vllm_w8a8="passed")
    known = json.loads((run.folder("verify") / "parity.json").read_text())
    known["scores"] = {"vllm": {"score": 49.0}, "vllm-w8a8": {"score": 51.0}}
    edit(run, "verify/parity.json", **known)
    merge = run.recipe.merge.model_copy(update={"choose": rule})
    artifact, _ = serve_serving.pick(Run(run.root, run.recipe.model_copy(update={"merge": merge})), ServeOptions())
    assert artifact.name == picked


@pytest.mark.parametrize(
    ("statuses", "asked", "error", "words"),
    [
        ({"onnx_fp32": "measured"}, ServeOptions(), MissingArtifact, "no export vllm"),
        ({"vllm": "failed"}, ServeOptions(), ParityFailed, "vllm failed the gate"),
        ({"vllm": "failed"}, ServeOptions(artifact="vllm"), ParityFailed, "vllm failed the gate"),
        ({"vllm": "passed"}, ServeOptions(artifact="vllm-w8a8"), MissingArtifact, "vllm-w8a8"),
    ],
)
def test_nothing_to_serve(
    tmp_path: Path, statuses: dict[str, str], asked: ServeOptions, error: type[QkitError], words: str
) -> None:
    with pytest.raises(error, match=words):
        serve_serving.pick(a_run(tmp_path, **statuses), asked)


def test_what_was_said_of_an_export_that_has_been_made_anew_is_not_said_of_this_one(tmp_path: Path) -> None:
    run = a_run(tmp_path, onnx_int4="passed", onnx_fp32="measured")
    assert "onnx-int4 (passed" in serve_serving.pick(run, ServeOptions("onnxruntime"))[1]
    manifest = run.manifest()
    manifest["stages"]["export"]["outputs"]["export/onnx-int4/model.onnx"]["sha256"] = 64 * "f"
    edit(run, "run.json", **manifest)
    assert "onnx-fp32 (measured" in serve_serving.pick(run, ServeOptions("onnxruntime"))[1]
    assert "onnx-int4 (unverified" in serve_serving.pick(run, ServeOptions("onnxruntime", "onnx-int4"))[1]


def foreign(source: object, asked: ServeOptions | None = None, *overrides: str) -> Serving:
    return serve_serving.of_model(str(source), recipe_for(Options(str(source)), overrides), asked or ServeOptions())


def test_what_vllm_has_no_loader_for(tmp_path: Path) -> None:
    if not vllm.methods():
        pytest.skip("vLLM is not installed")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        NotDeployable, match=r"by bitsandbytes, which the installed vLLM does not load .*compressed-tensors"
    ):
        foreign(tmp_path)
    file.write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    assert foreign(tmp_path).model == str(tmp_path)


def test_a_hub_id_goes_to_vllm_as_it_is() -> None:
    made = foreign("owner/name")
    assert "owner/name" in lifecycle.argv(made, 1) and made.name == "owner/name"


@pytest.mark.parametrize(
    ("source", "asked", "words"),
    [
        ("nowhere", ServeOptions(), "no such run directory or model folder"),
        ("owner/name", ServeOptions("onnxruntime"), "no such run directory"),
        (Path(__file__).parent, ServeOptions(), r"config\.json is missing"),
    ],
)
def test_no_model(source: object, asked: ServeOptions, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        foreign(source, asked)


# --- does it fit ------------------------------------------------------------------------------------------------------


def test_weights_and_cache_for_the_length_and_the_number_that_are_wanted(tiny_model: Path) -> None:
    """2 layers x 1 key-value head of 32, keys and values in bf16: 256 bytes a token."""
    made = fits.planned(foreign(tiny_model, None, "serve.max_model_len=512", "serve.concurrency=10"))
    assert made
    items = {item.name: item.bytes for item in made.items}
    assert items["kv_cache"] == 10 * 512 * 256
    assert items["weights"] == (tiny_model / "model.safetensors").stat().st_size


def test_weights_that_a_folder_holds_twice_are_loaded_once(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "consolidated.safetensors").symlink_to(tiny_model / "model.safetensors")
    plan = fits.planned(foreign(tmp_path))
    assert plan
    (weights,) = [item.bytes for item in plan.items if item.name == "weights"]
    assert weights == (tiny_model / "model.safetensors").stat().st_size


def test_too_much_is_refused_with_what_to_change(tiny_model: Path) -> None:
    made = foreign(tiny_model, None, "serve.max_model_len=400000", "serve.concurrency=4096")
    with pytest.raises(DoesNotFit, match=r"Largest: kv_cache .* Try serve\.concurrency=128"):
        fits.planned(made)


def test_a_cpu_server_is_given_the_cache_that_was_planned(tiny_model: Path) -> None:
    made = foreign(tiny_model, None, "serve.max_model_len=512", f"serve.concurrency={(3 << 30) // (512 * 256)}")
    assert made.extras.cache_bytes == 3 << 30


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert process.api_key(file, {"VLLM_API_KEY": "from-environment"}) == "from-file"
    assert process.api_key(None, {"VLLM_API_KEY": "from-environment"}) == "from-environment"
    assert process.api_key(None, {}) == ""


@pytest.mark.parametrize("text", ["", " \n", "two words", "schlüssel"])
def test_no_key_in_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(ServerError, match="openssl rand"):
        process.api_key(tmp_path / "key")


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "10.0.0.1"])
def test_other_addresses_need_a_key(tiny_model: Path, host: str) -> None:
    done = qkit("serve", tiny_model, "--set", f"serve.host={host}", env={"VLLM_API_KEY": ""})
    assert done.returncode == 2 and "--api-key-file" in done.stderr


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:1"), ("::1", "http://[::1]:1"), ("10.0.0.1", "http://10.0.0.1:1")]
)
def test_where_a_client_on_this_machine_asks(host: str, url: str) -> None:
    assert process.url_of(host, 1) == url


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(folder: Path, base: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": ["q_proj"], **config}))
    how = Recipe.model_validate({"task": "chat", "model": {"source": str(base)}, "data": {}})
    write_adapter_note(folder, base, how, [])
    return folder


def test_an_adapter_of_this_base(tiny_model: Path, tmp_path: Path) -> None:
    made = checked("sql", adapter(tmp_path / "a", tiny_model, r=20), tiny_model)
    assert (made.name, made.rank) == ("sql", 32)


def test_an_adapter_of_another_base(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path / "a", other_model)
    done = qkit("serve", tiny_model, "--adapter", f"sql={place}")
    assert done.returncode == 2 and f"was trained on {other_model}" in done.stderr


def test_adapters_go_on_the_base_and_not_on_what_a_run_exports(
    tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    run = a_run(tmp_path, vllm="passed")
    for file in tiny_model.iterdir():
        (run.folder("export") / "vllm" / file.name).unlink(missing_ok=True)
        (run.folder("export") / "vllm" / file.name).symlink_to(file)
    base = run.recipe.model.model_copy(update={"source": str(other_model), "format": "safetensors"})
    run = Run(run.root, run.recipe.model_copy(update={"model": base}))
    place = adapter(tmp_path / "a", other_model)
    with pytest.raises(
        ModelError,
        match=rf"(?s)was trained on.*`qkit serve {other_model} --adapter sample_run=.* --adapter sql={place}`",
    ):
        serve_serving.of_run(run, ServeOptions(adapters=(f"sql={place}",)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 513}, "rank is 513"),
        ({"r": 8, "rank_pattern": {"q_proj": 600}}, "rank is 600"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["model.embed_tokens"]}, "embed_tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve(
    tiny_model: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(NotDeployable, match=words):
        checked("sql", adapter(tmp_path / "a", tiny_model, **config), tiny_model)


def test_ranks() -> None:
    ranks = (1, 2, 8, 9, 200, 300, 512)
    assert [rank_for({"r": rank, "target_modules": "all-linear"}) for rank in ranks] == [1, 8, 8, 16, 256, 320, 512]


@pytest.mark.parametrize("text", ["runs/sql", "=runs/sql", "sql=", "a b=runs/sql", "--x=y"])
def test_adapters_are_written_name_run(text: str) -> None:
    with pytest.raises(ServerError, match="name=RUN"):
        parse(text)


# --- printing ---------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_is_started(tiny_model: Path) -> None:
    shell = qkit(
        "serve",
        tiny_model,
        "--print",
        "shell",
        "--",
        "--dtype",
        "float32",
        "--seed",
        "1",
        env={"VLLM_API_KEY": "a-secret"},
    )
    words = shlex.split(shell.stdout.replace("\\\n", " "))
    begin = words.index(sys.executable)
    assert words[begin:] == [*lifecycle.argv(foreign(tiny_model), 8000), "--dtype", "float32", "--seed", "1"]
    assert "HF_HUB_OFFLINE=1" in words and "a-secret" not in shell.stdout


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_printed_line_starts_nothing_open_without_a_key(tiny_model: Path, host: str, key: bool) -> None:
    shell = qkit("serve", tiny_model, "--print", "shell", "--set", f"serve.host={host}").stdout
    assert ("${VLLM_API_KEY:?" in shell) == key
    refused = subprocess.run(["sh", "-c", shell.splitlines()[0].rstrip("\\")], env={}, capture_output=True, text=True)
    assert (refused.returncode != 0 and "set it to the API key" in refused.stderr) == key


@pytest.mark.parametrize(
    ("target", "words", "said"),
    [
        ("owner/name", [], "hf download owner/name"),
        (None, ["--runtime", "onnxruntime"], "--print shell"),
    ],
)
def test_what_a_container_would_lack_is_not_printed(
    tiny_model: Path, tmp_path: Path, target: str | None, words: list[str], said: str
) -> None:
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {}}}')
    for form in ("compose", "kubernetes"):
        done = qkit("serve", target or tmp_path, *words, "--print", form)
        assert done.returncode == 2 and said in done.stderr and not done.stdout


@pytest.mark.parametrize("form", ["compose", "kubernetes"])
def test_printed_manifests_hold_no_key(tiny_model: Path, form: str) -> None:
    import yaml

    done = qkit("serve", tiny_model, "--print", form, env={"VLLM_API_KEY": "a-secret"})
    assert done.returncode == 0 and list(yaml.safe_load_all(done.stdout)) and "a-secret" not in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--print", "toml"], "shell, compose, kubernetes"),
        (["--runtime", "tensorrt"], "vllm, onnxruntime"),
        (["a-word-too-many"], "after `--`"),
        (["--dtype", "float32"], "No such option"),
        (["--", "--host", "0.0.0.0"], "serve.host"),
    ],
)
def test_mistakes(tiny_model: Path, words: list[str], said: str) -> None:
    done = qkit("serve", tiny_model, *words)
    assert done.returncode == 2 and said in done.stderr


def test_its_own_start_is_quick(tiny_model: Path) -> None:
    """All that happens before a server is started, in CPU seconds, since other processes run beside this test."""
    code = (
        "import resource, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-m', 'qkit', 'serve', {str(tiny_model)!r}, '--print', 'shell'], check=True, stdout=2)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 1.0


# --- ending by itself -------------------------------------------------------------------------------------------------


def test_back_off(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that ends at once: without --restart it is said once; and what was never ready is not started again."""
    program = process.Program("a program", (sys.executable, "-c", "import sys; sys.exit('ValueError: no such thing')"))
    told: list[float] = []

    def start(serving: Serving) -> process.Server:
        return process.Server(program, "tiny", serving.section, serving.section.port, tmp_path / "log")

    monkeypatch.setattr(lifecycle, "start", start)
    made = foreign(tiny_model, None, "serve.port=0")
    begin = time.monotonic()
    for restart in (None, lambda why, pause: told.append(pause)):
        with pytest.raises(ServerError, match="ended while starting: ValueError: no such thing"):
            lifecycle.serve(made, lambda _: None, lifecycle.watch, restart)
    assert told == [] and time.monotonic() - begin < 10


SHARER = """
import os, signal, subprocess, sys, time
from multiprocessing import shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = shared_memory.SharedMemory(create=True, size=64)
child = os.fork()
if child == 0:
    time.sleep(600)  # ignores SIGTERM too, and holds the tracker's pipe
print(memory.name, child, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_program_that_ignores_sigterm_leaves_neither_process_nor_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM does while it starts. The guard's patience is 10 s and 3 s; a copy of it with less is run here."""
    from qkit.core import process as core_process

    quick = tmp_path / "child.py"
    quick.write_text(Path(core_process.__file__).read_text().replace("GRACE_SECONDS = 10.0", "GRACE_SECONDS = 0.5"))
    monkeypatch.setattr(core_process, "__file__", str(quick))
    started = core_process.Child([sys.executable, "-c", SHARER], tmp_path / "log")
    while len(words := (tmp_path / "log").read_text().split()) < 2:
        time.sleep(0.02)
    memory, below = Path("/dev/shm") / words[0], int(words[1])
    assert memory.exists() and Path(f"/proc/{below}").exists()
    started.stop()
    ended = not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE
    assert not memory.exists() and ended
