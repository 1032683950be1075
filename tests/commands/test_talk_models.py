"""`qkit chat` with real models: what a second turn computes, and that answers are those of the runtimes and of the run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.command import qkit_here
from helpers.exporting import job_for
from helpers.tiny import build_tokenizer
from qkit.commands.talk.dialogue import Dialogue
from qkit.commands.talk.job import Job
from qkit.commands.talk.speakers import prompt_ids
from qkit.commands.talk.targets import opened
from qkit.core.device import detect
from qkit.core.files import read_lines
from qkit.export.formats import onnx as exporter
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.runtime import open_runtime
from qkit.run.directory import Run
from qkit.runtimes._continued import continued
from qkit.runtimes._onnx_traced import TracedRuntime

GREEDY = {"temperature": 0, "max_tokens": 8}


def count_tokens(model: Any) -> list[int]:
    """How many tokens each forward pass of a transformers model gets, from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return sizes


@pytest.mark.slow
def test_a_second_turn_reads_only_its_own_tokens(tiny_model: Path) -> None:
    with open_runtime("transformers", tiny_model, detect()) as runtime:
        sizes, text = count_tokens(runtime.model), continued(runtime)
        first = list(range(3, 43))
        token = int(text.logits_after(first).argmax())
        text.logits_after([*first, token])
        second = [*first, token, 50, 51, 52]
        after = text.logits_after(second)
        assert sizes == [40, 1, 3] and text.computed == 44
        np.testing.assert_allclose(after, continued(runtime).logits_after(second), atol=0.1)  # bf16
        changed = [*first[:10], 60, 61]
        after = text.logits_after(changed)
        assert sizes[-1] == 2
        np.testing.assert_allclose(after, continued(runtime).logits_after(changed), atol=0.1)


@pytest.mark.slow
def test_an_interrupt_in_the_middle_of_a_pass_leaves_a_cache_that_is_right(tiny_model: Path) -> None:
    with open_runtime("transformers", tiny_model, detect()) as runtime:
        text, first = continued(runtime), list(range(3, 43))
        text.logits_after(first)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = runtime.model.get_decoder().layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            text.logits_after([*first, 50, 51])
        hook.remove()
        after, sizes = text.logits_after([*first, 60]), count_tokens(runtime.model)
        np.testing.assert_allclose(after, continued(runtime).logits_after([*first, 60]), atol=0.1)
        assert text.computed == 41 and sizes == [41]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", "int4"])
def test_onnx_continues_a_text(onnx_exports: dict[str, Path], variant: str) -> None:
    """More tokens than a cache has room for at first; a beginning that changes; and what it says is what the runtime says."""
    with open_runtime("onnxruntime", onnx_exports[variant], detect()) as runtime:
        text, ids = continued(runtime), [3 + n % 200 for n in range(250)]
        said: list[int] = []
        for _ in range(12):
            said.append(int(text.logits_after([*ids, *said]).argmax()))
        assert text.computed == 250 + 11
        tolerance = 1e-3 if variant == "fp32" else 1.0
        if variant == "fp32":
            assert said == runtime.generate([ids], 12, frozenset())[0]
        for other in ([*ids, *said, 5, 6, 7], [*ids[:100], 5, 6, 7], ids[:50]):
            before, after = text.computed, text.logits_after(other)
            assert text.computed - before == (4 if len(other) > 250 else 3 if len(other) > 50 else 1)
            np.testing.assert_allclose(after, continued(runtime).logits_after(other), atol=tolerance)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TRACED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "cohere2": {**WIDE, "num_key_value_heads": 1, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", [*TRACED])
def test_a_traced_graph_continues_a_text(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    pytest.importorskip("onnxruntime_genai")
    torch.manual_seed(0)
    small = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **small, **TRACED[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    exporter.export(job_for(tmp_path / "model", tmp_path / "run"), tmp_path / "onnx", "fp32")
    with open_runtime("onnxruntime", tmp_path / "onnx", detect()) as runtime:
        assert isinstance(runtime, TracedRuntime)
        text, ids = continued(runtime), [3 + n * 37 % 200 for n in range(30)]
        said: list[int] = []
        for _ in range(6):
            said.append(int(text.logits_after([*ids, *said]).argmax()))
        assert said == runtime.generate([ids], 6, frozenset())[0] and text.computed == 35
        for other, new in (([*ids, *said, 5, 6], 3), ([*ids[:20], 5, 6], 2), (ids[:12], 1)):
            before, after = text.computed, text.logits_after(other)
            assert text.computed - before == new
            np.testing.assert_allclose(after, continued(runtime).logits_after(other), atol=1e-3)


@pytest.mark.slow
def test_an_export_without_its_run_says_what_its_runtime_says(
    onnx_exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two stop tokens are those of generation_config.json."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("say a\n"))
    done = qkit_here("chat", onnx_exports["fp32"], "--json", "--temperature", 0, "--max-tokens", 40)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    tokenizer = build_tokenizer()
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "say a"}])
    with open_runtime("onnxruntime", onnx_exports["fp32"], detect()) as runtime:
        (ids,) = runtime.generate([prompt], 40, frozenset({2, 7}))
    assert answer["answer"] == tokenizer.decode([one for one in ids if one not in (2, 7)], skip_special_tokens=True)
    assert (answer["completion_tokens"], answer["prompt_tokens"]) == (len(ids), len(prompt))
    assert answer["finish_reason"] == ("stop" if ids[-1] in (2, 7) else "length")


@pytest.mark.slow
def test_a_sliding_window_begins_anew_where_it_cannot_go_back(tmp_path: Path) -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from qkit.core.memory_meter import PeakMeter
    from qkit.runtimes.transformers import TransformersRuntime

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=64, num_key_value_heads=1, sliding_window=8, initializer_range=0.2, **sizes)
    runtime = TransformersRuntime(MistralForCausalLM(config).eval(), PeakMeter(detect()))
    text, ids = continued(runtime), list(range(20))
    text.logits_after(ids)
    text.logits_after([*ids, 1, 2])
    assert text.computed == 22
    after = text.logits_after([*ids[:15], 3])
    assert text.computed == 22 + 16
    np.testing.assert_allclose(after, continued(runtime).logits_after([*ids[:15], 3]), atol=1e-4)


@pytest.mark.slow
def test_answers_beside_the_base_are_those_that_the_run_recorded(
    trained_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts, so the same answers, of the adapter and of its base, of one model in memory."""
    rows = {
        (line["artifact"], line["row"]): line
        for line in read_lines(trained_run.folder("evaluate") / "predictions.jsonl")
    }
    questions = _questions(trained_run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n/reset\n".join(questions) + "\n"))
    done = qkit_here("chat", trained_run.root, "--beside", "base", "--json", "--temperature", 0, "--max-tokens", 8)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["model"] for one in said] == ["base", "adapter"] * len(questions)
    for name in ("base", "adapter"):
        recorded = [line["prediction"] for (artifact, _), line in sorted(rows.items()) if artifact == name]
        assert [one["answer"] for one in said if one["model"] == name] == recorded


@pytest.mark.slow
def test_prompts_are_those_of_training(trained_run: Run) -> None:
    import pyarrow.parquet as pq

    tokenizer = model_tokenizer.tokenizer_of(trained_run.recipe.model)
    table = pq.read_table(trained_run.folder("data") / "test.parquet").to_pylist()
    for question, row in zip(_questions(trained_run), table, strict=True):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        ids = prompt_ids(tokenizer, messages)
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"][: len(ids)] == [-100] * len(ids) and row["labels"][len(ids)] != -100


def _questions(run: Run) -> list[str]:
    source = run.recipe.data.test[0]
    rows = Path(source.source).read_text().splitlines()[:4]
    return [json.loads(row)["messages"][0]["content"] for row in rows]


@pytest.mark.slow
def test_a_run_keeps_its_cache_over_turns(trained_run: Run) -> None:
    talk = opened(Job(str(trained_run.root), sampling=GREEDY))
    assert talk.title.startswith("merged of ") and talk.title.endswith(
        "(the best here, not verified) with transformers"
    )
    dialogue = Dialogue(talk.speakers, talk.system)
    computed, prompts = [], []
    for question in ("say a ", "say b please ", "say c "):
        (answering,) = list(_read(dialogue.next(question)))
        computed.append(answering.reply.computed_tokens)
        prompts.append(answering.reply.prompt_tokens)
    talk.close()
    assert computed[0] == prompts[0] and talk.system == "Be brief."
    for turn in (1, 2):
        assert computed[turn] < prompts[turn] - prompts[turn - 1] + GREEDY["max_tokens"]


def _read(answers: Any) -> Any:
    for answering in answers:
        "".join(answering.pieces)
        yield answering
