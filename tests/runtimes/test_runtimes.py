"""The contract of runtime.py on transformers; each other runtime has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qkit.core.device import detect
from qkit.plugins.runtime import Runtime, TokenRow, open_runtime

PROMPTS = [list(range(3, 3 + n)) for n in (4, 9, 17, 6)]
STOP = frozenset({2})


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Runtime:
    return open_runtime("transformers", tiny_model, detect())


def test_greedy_equals_transformers_generate(opened: Runtime, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.bfloat16)
    together = opened.generate(PROMPTS, 12, STOP, batch_size=1)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
        )
        assert completion == wanted[0, len(prompt) :].tolist()


def test_rows_that_end_leave_the_batch(opened: Runtime) -> None:
    free = opened.generate(PROMPTS, 12, frozenset(), batch_size=4)
    stop = frozenset({free[0][2]})
    ends = [(tokens.index(free[0][2]) if free[0][2] in tokens else 11) for tokens in free]
    steps = list(opened.steps(PROMPTS, 12, stop))
    assert min(ends) < max(ends) == len(steps) - 1
    assert all((index in step) == (number <= ends[index]) for number, step in enumerate(steps) for index in range(4))


def test_scores_are_the_models_log_probabilities(opened: Runtime, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.bfloat16)
    rows = [TokenRow(prompt, len(prompt) // 2) for prompt in PROMPTS]
    for row, scores in zip(rows, opened.score(rows), strict=True):
        with torch.inference_mode():
            wanted = model(torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)[row.start - 1 : -1]
        assert scores.full is not None
        np.testing.assert_allclose(scores.full, wanted.numpy(), atol=0.05)
        targets = [scores.full[i, t] for i, t in enumerate(row.input_ids[row.start :])]
        np.testing.assert_array_equal(scores.targets, targets)
        np.testing.assert_array_equal(scores.top1, scores.full.argmax(1))


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("cohere", {"logit_scale": 0.1}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 1.0, "head_dim": 16}),
    ],
)
def test_scores_are_of_the_logits_that_the_model_ends_with(
    tmp_path: Path, family: str, changed: dict[str, Any]
) -> None:
    """Some families do something to them after the head."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **changed)).eval()
    model.save_pretrained(tmp_path)
    with open_runtime("transformers", tmp_path, detect()) as opened, torch.inference_mode():
        (scores,) = opened.score([TokenRow(PROMPTS[1], 1)])
        wanted = model(torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)[:-1]
    np.testing.assert_allclose(scores.full, wanted.numpy(), atol=1e-4)


def test_timed_counts_every_token(opened: Runtime) -> None:
    timings = opened.timed(PROMPTS, 5)
    assert [len(t.token_seconds) for t in timings] == [5] * 4
    assert all(t.token_seconds == sorted(t.token_seconds) for t in timings)


def test_long_prompts_share_smaller_batches(opened: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to the longest of them, no batch has more tokens than are let; one prompt may have them all. The order stays."""
    alone, seen, steps = opened.generate(PROMPTS, 12, STOP, batch_size=1), [], opened.steps

    def watched(prompts: Any, *given: Any) -> Any:
        seen.append([len(prompt) for prompt in prompts])
        return steps(prompts, *given)

    told: list[int] = []
    monkeypatch.setattr(opened, "steps", watched)
    monkeypatch.setattr(opened, "prefill_tokens", 12)
    answers = opened.generate(PROMPTS, 12, STOP, batch_size=8, advance=told.append)
    assert seen == [[4, 6], [9], [17]] and told == [2, 1, 1]
    assert answers[1:3] == alone[1:3]  # a batch of several rounds otherwise
