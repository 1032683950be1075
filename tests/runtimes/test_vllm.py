"""vLLM as far as it goes without starting it; test_serve_vllm.py starts it. QKIT_UPDATE_GOLDEN=1 rewrites the command lines."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.paths import GOLDEN
from qkit.core.device import Device
from qkit.core.errors import ServerError
from qkit.plugins.runtime import RowScores, Runtime, TokenRow, open_runtime
from qkit.recipe.schema import Serve
from qkit.runtimes import vllm
from qkit.server import log_causes, process
from qkit.server.adapters import Adapter

FILE = GOLDEN / "vllm_argv.json"
GOLDEN = json.loads(FILE.read_text())
CPU = Device("cpu", "a CPU", 24 << 30, 2)
CARD = Device("cuda", "a card", 24 << 30, 8)
SQL, RAG = Adapter("sql", Path("/runs/sql/train/adapter"), 16), Adapter("rag", Path("/runs/rag/train/adapter"), 64)
CASES = {
    "cpu": (CPU, Serve(), vllm.Extras()),
    "cpu, eager": (CPU, Serve(enforce_eager=True), vllm.Extras()),
    "card": (CARD, Serve(gpu_memory_utilization=0.8, max_num_seqs=64), vllm.Extras()),
    "two adapters": (CARD, Serve(), vllm.Extras((SQL, RAG))),
    "adapters to come": (CARD, Serve(), vllm.Extras(runtime_adapters=True)),
    "an adapter, and others to come": (CARD, Serve(), vllm.Extras((SQL,), runtime_adapters=True)),
    "key and rest": (CPU, Serve(host="0.0.0.0"), vllm.Extras(key="a-secret", rest=("--dtype", "float32"))),
}


@pytest.fixture(params=["0.32.0", "0.33.0"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if this vLLM were installed."""
    monkeypatch.setattr(vllm, "version", lambda: request.param)
    return str(request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_command_line(case: str, release: str) -> None:
    """The golden files are those of the older one; the newer is started by another module, and told the same."""
    device, section, extras = CASES[case]
    made = vllm.argv(Path("m"), "name", section, 8001, device, extras)
    assert made[0] == sys.executable
    if release == "0.33.0":
        assert made[1:] == ["-m", "vllm.entrypoints.launchers.api_server.entry", *GOLDEN[case][2:]]
        return
    if os.environ.get("QKIT_UPDATE_GOLDEN"):
        GOLDEN[case] = made[1:]
        lines = [f" {json.dumps(name)}: {json.dumps(words)}" for name, words in GOLDEN.items()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert made[1:] == GOLDEN[case]


@pytest.mark.parametrize(
    ("installed", "module"),
    [
        ("0.32.1", vllm.API_SERVER),
        ("0.33.0rc1", vllm.LAUNCHER),
        ("0.33.0+cpu", vllm.LAUNCHER),
        ("1.0", vllm.LAUNCHER),
        (None, vllm.API_SERVER),
    ],
)
def test_what_is_started_depends_on_the_version(installed: str | None, module: str) -> None:
    assert vllm.server_module(installed) == module


def test_what_is_started_is_there() -> None:
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    place = vllm.server_module(vllm.version()).removeprefix("vllm.").replace(".", "/")
    assert (Path(spec.submodule_search_locations[0]) / f"{place}.py").is_file()


def test_the_key_goes_by_the_environment_alone() -> None:
    device, section, extras = CASES["key and rest"]
    assert "a-secret" not in " ".join(vllm.argv("m", "name", section, 1, device, extras))
    assert vllm.environment(device, extras)["VLLM_API_KEY"] == "a-secret"
    assert "a-secret" not in repr(extras) and "a-secret" not in repr(process.Program("x", (), {"k": "a-secret"}))


def test_without_a_key_the_shell_s_own_is_not_taken() -> None:
    assert vllm.environment(CPU, vllm.Extras())["VLLM_API_KEY"] == ""


@pytest.mark.parametrize(("device", "gib"), [(CPU, "3"), (CARD, None)])
def test_only_a_cpu_server_is_told_about_its_cache(device: Device, gib: str | None) -> None:
    assert vllm.environment(device, vllm.Extras(cache_bytes=(2 << 30) + 1)).get("VLLM_CPU_KVCACHE_SPACE") == gib


def test_options_are_ones_that_vllm_has() -> None:
    """Read from its source, since importing it takes ten seconds."""
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    root = Path(spec.submodule_search_locations[0])
    files = ("engine/arg_utils.py", "entrypoints/*/cli_args.py", "config/model.py", "config/lora.py")
    text = "\n".join(file.read_text() for pattern in files for file in root.glob(pattern))
    options = {word[2:] for argv in GOLDEN.values() for word in argv if word.startswith("--")}
    assert {option for option in options if option.replace("-", "_") not in text} == set()


@pytest.mark.parametrize(
    ("log", "meaning"),
    [
        ("INFO fine\nOSError: [Errno 98] Address already in use\n", "serve.port=0"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "gpu_memory_utilization"),
        ("ValueError: Free memory on device (3/24 GiB) is less than desired", "other programs use"),
        (
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -4)\nEngineDeadError: EngineCore",
            "illegal instruction",
        ),
        (
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)\nEngineDeadError: EngineCore",
            "out-of-memory killer",
        ),
        ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0", "--dtype float16"),
        (
            "Worker proc VllmWorker-0 died unexpectedly (exit code: None)\nRuntimeError: Executor failed.",
            "out-of-memory",
        ),
        ("RuntimeError: CUDA error: no kernel image is available for execution", "build"),
        ("ValueError: LoRA rank 64 is greater than max_lora_rank 16.", "rank is raised"),
        ("ValueError: User-specified max_model_len (4096) is greater than the derived max_model_len", "max_model_len"),
        ("something\nRuntimeError: odd kernel\nbye\n", "odd kernel"),
        ("ValueError: the cause\nRuntimeError: Engine core initialization failed. See root cause above.", "the cause"),
        (
            "KeyError: the cause\nERROR error: ErrorInfo(message='no model', type='NotFoundError', code=404)",
            "the cause",
        ),
        ("", "its log is empty"),
    ],
)
def test_a_log_is_explained(log: str, meaning: str) -> None:
    assert meaning in log_causes.explain(log)


def test_ports() -> None:
    assert process.free_port(Serve(port=0)) > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match=r"cannot listen on.*serve\.port=0"):
            process.free_port(Serve(port=taken.getsockname()[1]))
    with pytest.raises(ServerError, match="cannot listen on"):
        process.free_port(Serve(host="192.0.2.1"))


# --- the runtime, with a server that answers each completion with the same choice ---------------------------------------


@contextmanager
def answering(choice: dict[str, Any], parent: str | None = None) -> Iterator[Runtime]:
    class Server(BaseHTTPRequestHandler):
        def answer(self, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "m", "parent": parent}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"choices": [choice]})

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        running = {"url": url, "model": "m", "pid": os.getpid(), "startup_seconds": 0.0}
        try:
            with open_runtime("vllm", Path(), CPU, running=running) as runtime:
                yield runtime
        finally:
            server.shutdown()


TOP = {token: -0.5 * (token + 1) for token in range(vllm.TOP_LOGPROBS)}


def check_scores(scores: RowScores) -> None:
    """Of the tokens 1 and 99. A true token has its score even when it is not among the top ones; it is not in the top then."""
    np.testing.assert_array_equal(scores.targets, np.array([-1.0, -30.0], np.float32))
    assert scores.top1.tolist() == [0, 0]
    assert scores.top_ids is not None and scores.top_ids.shape == (2, vllm.TOP_LOGPROBS) and 99 not in scores.top_ids
    assert scores.full is None


def test_scores_from_the_logprobs_of_a_prompt() -> None:
    top = {str(token): {"logprob": value} for token, value in TOP.items()}
    with answering({"prompt_logprobs": [None, top, {**top, "99": {"logprob": -30.0}}]}) as runtime:
        (scores,) = runtime.score([TokenRow([7, 1, 99], 1)])
    check_scores(scores)


def test_an_adapter_is_scored_token_by_token() -> None:
    top = {f"token_id:{token}": value for token, value in {**TOP, 99: -30.0}.items()}
    with answering({"logprobs": {"top_logprobs": [top]}}, parent="base") as runtime:
        (scores,) = runtime.score([TokenRow([7, 1, 99], 1)])
    check_scores(scores)


@pytest.mark.parametrize(("ids", "kept"), [([5, 2, 7], [5, 2]), ([5, 7], [5, 7]), ([2], [2])])
def test_completions_end_with_their_stop_token(ids: list[int], kept: list[int]) -> None:
    with answering({"token_ids": ids}) as runtime:
        assert runtime.generate([[1], [1, 2]], 8, frozenset({2})) == [kept, kept]
        assert list(runtime.steps([[1]], 8, frozenset({2}))) == [{0: token} for token in kept]
