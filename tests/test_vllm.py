"""vLLM as far as it goes without starting it; tests/test_pipeline.py starts it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from qkit.device import Device
from qkit.errors import ServerError
from qkit.recipe import Serve
from qkit.runtimes import vllm

CPU = Device("cpu", "a CPU", 24 << 30, 2)
CARD = Device("cuda", "a card", 24 << 30, 8)
COMMON = [
    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--served-model-name", "name"),
    *("--host", "127.0.0.1", "--port", "8001", "--max-model-len", "2048"),
]


@pytest.mark.parametrize(
    ("device", "section", "more"),
    [
        (CPU, Serve(), []),
        (CPU, Serve(enforce_eager=True), ["--enforce-eager"]),
        (CARD, Serve(gpu_memory_utilization=0.8), ["--gpu-memory-utilization", "0.8"]),
    ],
)
def test_the_command_line(device: Device, section: Serve, more: list[str]) -> None:
    assert vllm.argv(Path("m"), "name", section, 8001, device) == [*COMMON, *more]


@pytest.mark.parametrize(("device", "wants"), [(CPU, True), (CARD, False)])
def test_only_a_cpu_server_is_told_about_its_cache(device: Device, wants: bool) -> None:
    assert ("VLLM_CPU_KVCACHE_SPACE" in device.server_environment) is wants


@pytest.mark.parametrize(
    ("log", "meaning"),
    [
        ("INFO fine\nOSError: [Errno 98] Address already in use\n", "serve.port=0"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "gpu_memory_utilization"),
        ("ValueError: Free memory on device (3/24 GiB) is less than desired", "other programs hold"),
        ("something\nRuntimeError: odd kernel\nbye\n", "odd kernel"),
        ("", "it said nothing"),
    ],
)
def test_a_log_is_explained(log: str, meaning: str) -> None:
    assert meaning in vllm.explain(log)


def test_ports() -> None:
    assert vllm.free_port(Serve(port=0)) > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match=r"cannot be listened on.*serve\.port=0"):
            vllm.free_port(Serve(port=taken.getsockname()[1]))
    with pytest.raises(ServerError, match="cannot be listened on"):
        vllm.free_port(Serve(host="192.0.2.1"))


def test_scores_from_prompt_logprobs() -> None:
    """The true token is listed even when it is not among the top ones; it is no part of the top then."""
    top = {str(token): {"logprob": -0.5 * (token + 1), "rank": token + 1} for token in range(vllm.TOP_LOGPROBS)}
    low = {**top, "99": {"logprob": -30.0, "rank": 4000}}
    scores = vllm._row_scores([top, low], [1, 99])
    np.testing.assert_array_equal(scores.targets, np.array([-1.0, -30.0], np.float32))
    assert scores.top1.tolist() == [0, 0]
    assert scores.top_ids is not None and scores.top_ids.shape == (2, vllm.TOP_LOGPROBS) and 99 not in scores.top_ids
    assert scores.full is None


@pytest.mark.parametrize(("ids", "kept"), [([5, 2, 7], [5, 2]), ([5, 7], [5, 7]), ([2], [2])])
def test_completions_end_with_their_stop_token(ids: list[int], kept: list[int]) -> None:
    assert vllm._with_stop({"token_ids": ids}, frozenset({2})) == kept
