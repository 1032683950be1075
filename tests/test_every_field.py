"""Every field of every section of a recipe changes something: the plan, what a library or a server is given, the rows, or a named place.

A new field fails here until its line is in the table. A probe is asked twice, with a field as it is and changed, and must answer otherwise.
Where showing that would take a whole stage, the line names the file that reads the field, and the words it reads it by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.paths import PACKAGE
from helpers.tiny import chat_rows
from qkit import pipeline
from qkit.core import device
from qkit.core.errors import UserError
from qkit.measure import scores
from qkit.model import config, load
from qkit.plan import _rates, gpus, sheet
from qkit.plan import plan as plan_plan
from qkit.recipe import idle, schema
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.recipe.section import Section
from qkit.run.directory import Run
from qkit.runtimes import vllm
from qkit.server import process
from qkit.train.trainers import sft

pytestmark = pytest.mark.slow

# --- probes -------------------------------------------------------------------------------------------------------------


def planned(how: Recipe) -> Any:
    """All lines of the plan, in bytes, and its time."""
    found = sheet.to_dict(sheet.sheet(how, gpus.device("rtx-4090")))
    every = [
        plan_plan.stage_items(how, config.shape_of(how.model), gpus.device("rtx-4090"), s) for s in plan_plan.STAGES
    ]
    return json.dumps(found, sort_keys=True), [[(item.name, item.bytes) for item in items] for items in every]


def trainer(how: Recipe) -> Any:
    return sft.sft_config(how, device.detect(), Path("out")).to_dict()


def course(how: Recipe) -> Any:
    """How the learning rate goes, for each group of parameters."""
    return _rates.course(how.model_copy(update={"train": how.train.model_copy(update={"max_steps": 9})})).to_dict()


def adapter(how: Recipe) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        base = Qwen2ForCausalLM(Qwen2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    return sft.lora_config(how, base).to_dict()


def bitsandbytes(how: Recipe) -> Any:
    return load.quantization_config(how.quantization).to_dict()


def served(how: Recipe) -> Any:
    """vLLM's command line on a card, and what the middleware is told."""
    given = vllm.argv("merged", "merged", how.serve, how.serve.port, gpus.device("rtx-4090"))
    return given, process.limits(how.serve, "drain")


def scored(how: Recipe) -> Any:
    return scores.score(scores.Grades((True, False, True, True)), 0.5, how.evaluate, how.seed)


def data(how: Recipe) -> Any:
    """What the stage makes: the rows of each split, the ledger's reasons and the checks; or its refusal."""
    root = Path(how.data.train[0].source).parent / f"run-{len(list(Path(how.data.train[0].source).parent.iterdir()))}"
    run = Run.create(root, how)
    try:
        pipeline.execute(run, "data")
    except UserError as error:
        return str(error)
    folder = run.folder("data")
    tables = [
        pq.read_table(folder / f"{name}.parquet").to_pydict() for name in ("train", "validation", "test", "ledger")
    ]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return tables, [(check["name"], check["status"]) for check in summary["checks"]]


def said(how: Recipe) -> Any:
    return list(idle.remarks(how))


Probe = Callable[[Recipe], Any]
Line = tuple[Probe, dict[str, Any]] | tuple[Probe, dict[str, Any], dict[str, Any]]
Place = tuple[str, str]

PREFERENCE = (
    *("loss_type", "beta", "label_smoothing", "discopop_tau"),
    *("f_divergence_type", "f_alpha_divergence_coef"),
)

# By section and field: a probe, the change, and what else must be set before and after; or the file that reads it, and by which words.
TABLE: dict[str, Line | Place] = {
    "Recipe.task": ("evaluate/stage.py", "open_task(run.recipe.task)"),
    "Recipe.seed": (trainer, {"seed": 7}),
    "Recipe.method": ("model/adapters/methods.py", "recipe.method"),
    "Recipe.micro_batches": (planned, {"micro_batches": 4}, {"data.batch_tokens": 8192}),
    "Model.source": (planned, {"model.source": "Qwen/Qwen2.5-3B"}),
    "Model.revision": ("model/source.py", "model.revision"),
    "Model.sha256": ("model/source.py", "sha256=model.sha256"),
    "Model.trust_remote_code": ("model/load.py", '"trust_remote_code": recipe.model.trust_remote_code'),
    "Model.attn_implementation": (planned, {"model.attn_implementation": "eager"}),
    "Model.chat_template": (data, {"model.chat_template": "plain.jinja"}),
    "Model.pad_token": ("tasks/_conversation/encoder.py", "recipe.model.pad_token"),
    "Model.add_tokens": (planned, {"model.add_tokens": ["<a>", "<b>"]}),
    "Quantization.load_in_4bit": (planned, {"quantization.load_in_4bit": False}),
    "Quantization.bnb_4bit_quant_type": (bitsandbytes, {"quantization.bnb_4bit_quant_type": "fp4"}),
    "Quantization.bnb_4bit_use_double_quant": (planned, {"quantization.bnb_4bit_use_double_quant": False}),
    "Quantization.bnb_4bit_compute_dtype": (bitsandbytes, {"quantization.bnb_4bit_compute_dtype": "float16"}),
    "Lora.r": (planned, {"lora.r": 8}),
    "Lora.lora_alpha": (adapter, {"lora.lora_alpha": 8}),
    "Lora.lora_dropout": (planned, {"lora.lora_dropout": 0.1}),
    "Lora.target_modules": (planned, {"lora.target_modules": ["q_proj"]}),
    "Lora.target_parameters": ("model/adapters/targets.py", "target_parameters"),
    "Lora.use_dora": (adapter, {"lora.use_dora": True}),
    "Lora.init_lora_weights": (adapter, {"lora.init_lora_weights": "gaussian"}),
    "Lora.init_from": ("model/adapters/earlier.py", "section.init_from"),
    "Lora.use_rslora": (adapter, {"lora.use_rslora": True}),
    "Lora.loraplus_lr_ratio": (course, {"lora.loraplus_lr_ratio": 8.0}),
    **{
        f"Bottleneck.{name}": ("model/adapters/methods.py", "**recipe.bottleneck.model_dump()")
        for name in schema.Bottleneck.model_fields
    },
    "Train.trainable": ("model/adapters/trainable.py", "recipe.train.trainable"),
    "Recipe.peft": ("model/adapters/methods.py", "recipe.peft.items()"),
    "Head.dropout": ("model/load.py", "section.dropout"),
    "Head.pooling": ("model/load.py", "recipe.head.pooling"),
    "Head.layers": ("model/pooled_head.py", 'settings["layers"]'),
    "Head.activation": ("model/pooled_head.py", 'settings["activation"]'),
    "Layers.frozen": ("model/adapters/trainable.py", "recipe.layers.frozen"),
    "Layers.unfreeze_steps": ("model/adapters/layers.py", "section.unfreeze_steps"),
    "Layers.rate_decay": ("model/adapters/rates.py", "recipe.layers.rate_decay"),
    "Loss.name": ("train/losses.py", "section.name"),
    "Loss.class_weights": ("train/losses.py", "section.class_weights"),
    "Loss.label_smoothing": ("train/losses.py", "section.label_smoothing"),
    "Loss.delta": ("train/losses.py", "section.delta"),
    "Loss.gamma": ("train/losses.py", "section.gamma"),
    "Preference.loss_weights": ("recipe/preference.py", "self.loss_weights"),
    **{f"Preference.{name}": ("train/_preference/losses.py", f"section.{name}") for name in PREFERENCE},
    **{
        f"Preference.{name}": ("train/_preference/trainer.py", words)
        for name, words in (("ld_alpha", 'section, "ld_alpha"'), ("use_weighting", "self.section.use_weighting"))
    },
    **{
        f"Feedback.{name}": ("train/_preference/rated.py", f"self.section.{name}")
        for name in schema.Feedback.model_fields
    },
    "Source.source": (data, {"data.train": [{"source": "other.jsonl"}]}),
    "Source.name": ("data/read.py", "load_dataset(name, source.name"),
    "Source.split": ("data/read.py", "source.split"),
    "Source.revision": ("data/read.py", "revision=source.revision"),
    "Source.streaming": ("data/read.py", "streaming=source.streaming"),
    "Source.sha256": ("data/read.py", "sha256=source.sha256"),
    "Source.answers": (
        data,
        {"data.train": [{"source": "calls.jsonl", "answers": "accepted.jsonl"}]},
        {"data.train": [{"source": "calls.jsonl"}], "task": "function_calling"},
    ),
    "Source.rows": (data, {"data.train": [{"source": "rows.jsonl", "rows": "4:12"}]}),
    "Source.format": (data, {"data.train": [{"source": "rows.jsonl", "format": "text"}]}),
    "Source.word_column": ("data/_read_conll.py", "source.word_column"),
    "Source.tag_column": ("data/_read_conll.py", "source.tag_column"),
    "Source.delimiter": ("data/read.py", "source.delimiter or DELIMITERS"),
    "Source.sample_by": (
        data,
        {"data.train": [{"source": "text.txt", "sample_by": "line"}]},
        {"data.train": [{"source": "text.txt"}]},
    ),
    "Source.weight": (
        data,
        {"data.train": [{"source": "rows.jsonl", "weight": 1.0}, {"source": "other.jsonl", "weight": 9.0}]},
        {"data.train": [{"source": "rows.jsonl"}, {"source": "other.jsonl"}]},
    ),
    "Split.train": (data, {"data.split": {"train": 0.5, "test": 0.5}}, {"data.split": {"train": 0.8, "test": 0.2}}),
    "Split.validation": (
        data,
        {"data.split": {"train": 0.5, "validation": 0.3, "test": 0.2}},
        {"data.split": {"train": 0.8, "test": 0.2}},
    ),
    "Split.test": (data, {"data.split": {"train": 0.4, "test": 0.6}}, {"data.split": {"train": 0.8, "test": 0.2}}),
    "Clean.malformed": (data, {"data.clean": {"malformed": "drop"}}, {"data.train": [{"source": "malformed.jsonl"}]}),
    "Clean.roles": (data, {"data.clean": {"roles": "drop"}}, {"data.train": [{"source": "roles.jsonl"}]}),
    "Clean.unicode": (data, {"data.clean": {"unicode": "keep"}}, {"data.train": [{"source": "unicode.jsonl"}]}),
    "Clean.empty": (data, {"data.clean": {"empty": "fail"}}, {"data.train": [{"source": "empty.jsonl"}]}),
    "Clean.duplicate": (data, {"data.clean": {"duplicate": "keep"}}, {"data.train": [{"source": "twice.jsonl"}]}),
    "Clean.near_duplicate": (
        data,
        {"data.clean": {"near_duplicate": "drop"}},
        {"data.train": [{"source": "near.jsonl"}]},
    ),
    "Clean.overlap": (
        data,
        {"data.clean": {"overlap": "drop"}},
        {"data.test": [{"source": "rows.jsonl", "rows": ":3"}], "data.max_overlap": 1.0},
    ),
    "Clean.near_overlap": (
        data,
        {"data.clean": {"near_overlap": "drop"}},
        {"data.train": [{"source": "near.jsonl", "rows": ":1"}], "data.test": [{"source": "near.jsonl", "rows": "1:"}]},
    ),
    "Data.train": (data, {"data.train": [{"source": "other.jsonl"}]}),
    "Data.validation": (data, {"data.validation": [{"source": "other.jsonl"}]}),
    "Data.test": (data, {"data.test": [{"source": "other.jsonl"}]}),
    "Data.split": (data, {"data.split": {"train": 0.5, "test": 0.5}}),
    "Data.stride": ("tasks/_answering/windows.py", "section.stride"),
    "Data.weight": ("data/prepare.py", "recipe.data.weight"),
    "Data.label_separator": ("tasks/_encoder/labelled_text.py", "section.label_separator"),
    "Data.group": (data, {"data.group": "user"}, {"data.split": {"train": 0.5, "test": 0.5}}),
    "Data.stratify": (data, {"data.stratify": "topic"}, {"data.split": {"train": 0.5, "test": 0.5}}),
    "Data.max_overlap": (data, {"data.max_overlap": 1.0}, {"data.test": [{"source": "rows.jsonl", "rows": ":3"}]}),
    "Data.max_near_overlap": (
        data,
        {"data.max_near_overlap": 0.0},
        {"data.train": [{"source": "near.jsonl", "rows": ":1"}], "data.test": [{"source": "near.jsonl", "rows": "1:"}]},
    ),
    "Data.columns": (
        data,
        {"data.columns": {"prompt": "q", "completion": "a"}},
        {"data.train": [{"source": "columns.jsonl"}]},
    ),
    "Data.system": (data, {"data.system": "Be brief."}),
    "Data.ignore": (data, {"data.ignore": ["user", "topic"]}),
    "Data.loss": (data, {"data.loss": "all"}),
    "Data.max_length": (planned, {"data.max_length": 512}),
    "Data.too_long": (
        data,
        {"data.too_long": "split"},
        {"data.train": [{"source": "text.txt"}], "data.max_length": 20},
    ),
    "Data.packing": (planned, {"data.packing": True}),
    "Data.batch_tokens": (planned, {"data.batch_tokens": 8192}),
    "Data.batch_rows": (planned, {"data.batch_rows": 1}, {"data.max_length": 512}),
    "Data.clean": (data, {"data.clean": {"duplicate": "keep"}}, {"data.train": [{"source": "twice.jsonl"}]}),
    "Ledger.losses": ("train/stage.py", "recipe.ledger.losses"),
    "Train.learning_rate": (trainer, {"train.learning_rate": 1e-5}),
    "Train.embedding_learning_rate": (course, {"train.embedding_learning_rate": 1e-5}, {"model.add_tokens": ["<a>"]}),
    "Train.lr_scheduler_type": (trainer, {"train.lr_scheduler_type": "linear"}),
    "Train.lr_scheduler_kwargs": (course, {"train.lr_scheduler_kwargs": {"num_cycles": 1.0}}),
    "Train.warmup_steps": (trainer, {"train.warmup_steps": 0.1}),
    "Train.max_steps": (planned, {"train.max_steps": 10}),
    "Train.num_train_epochs": (trainer, {"train.num_train_epochs": 3.0}),
    "Train.gradient_accumulation_steps": (trainer, {"train.gradient_accumulation_steps": 4}),
    "Train.gradient_checkpointing": (
        planned,
        {"train.gradient_checkpointing": True},
        {"train.gradient_checkpointing": False},
    ),
    "Train.activation_offloading": (planned, {"train.activation_offloading": True}),
    "Train.weight_decay": (trainer, {"train.weight_decay": 0.1}),
    "Train.max_grad_norm": (trainer, {"train.max_grad_norm": 0.3}),
    "Train.optim": (planned, {"train.optim": "paged_adamw_8bit"}),
    "Train.optim_args": (planned, {"train.optim_args": "momentum=0.9"}, {"train.optim": "sgd"}),
    **{f"Train.{name}": (trainer, {f"train.{name}": 0.5}) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    "Train.bf16": ("train/trainers/labelled.py", "recipe.train.bf16"),
    "Train.logging_steps": (trainer, {"train.logging_steps": 5}),
    "Train.save_steps": (trainer, {"train.save_steps": 5}),
    "Train.save_total_limit": ("train/trainers/sft.py", "checkpoints_kept=recipe.train.save_total_limit"),
    "Train.report_to": ("tracking/reporting.py", "run.recipe.train.report_to"),
    "Train.run_name": ("tracking/guarded.py", "run.recipe.train.run_name"),
    "Train.neftune_noise_alpha": (trainer, {"train.neftune_noise_alpha": 5.0}),
    "Train.label_smoothing_factor": ("train/fast/token_loss.py", "section.label_smoothing_factor"),
    "Train.loss_type": (trainer, {"train.loss_type": "dft"}),
    "Train.eval_strategy": ("train/validation.py", 'section.eval_strategy == "no"'),
    "Train.eval_steps": ("recipe/validation.py", "train.eval_steps is not None"),
    "Train.eval_on_start": ("train/stage.py", "run.recipe.train.eval_on_start"),
    "Train.eval_rows": ("train/validation.py", "recipe.train.eval_rows"),
    "Train.eval_score_rows": ("train/validation.py", "recipe.train.eval_score_rows"),
    "Train.metric_for_best_model": ("train/validation.py", "= recipe.train.metric_for_best_model"),
    "Train.load_best_model_at_end": ("recipe/training.py", "return self.load_best_model_at_end"),
    "Train.early_stopping_patience": ("train/validation.py", "recipe.train.early_stopping_patience"),
    "Train.early_stopping_threshold": ("train/validation.py", "recipe.train.early_stopping_threshold"),
    "Evaluate.max_new_tokens": (planned, {"evaluate.max_new_tokens": 512}, {"data.max_length": 64}),
    "Evaluate.batch_size": (planned, {"evaluate.batch_size": 4}, {"data.max_length": 64}),
    "Evaluate.answer_pattern": ("tasks/chat.py", "section.answer_pattern"),
    "Evaluate.metrics": ("measure/answers.py", "section.metrics"),
    "Evaluate.max_answer_tokens": ("tasks/answer.py", "recipe.evaluate.max_answer_tokens"),
    "Evaluate.confidence": (scored, {"evaluate.confidence": 0.5}),
    "Merge.base": ("measure/candidates.py", "recipe.merge.base"),
    "Merge.choose": ("merge/stage.py", "run.recipe.merge.choose"),
    "Merge.dtype": (planned, {"merge.dtype": "float32"}),
    "Merge.max_shard_bytes": ("export/formats/bnb.py", "merge.max_shard_bytes"),
    "Export.formats": (planned, {"export.formats": ["safetensors"], "bench.runtimes": []}, {"bench.runtimes": []}),
    "Export.method": (said, {"export.method": "awq"}),
    "Export.calibration_rows": (said, {"export.calibration_rows": 7}),
    "Verify.gates": ("measure/gates.py", "verify.gates"),
    **{
        f"Gate.{name}": ("measure/gates.py", name)
        for name in ("kl_mean", "kl_row", "kl_p99", "top1", "max_difference", "score")
    },
    "Serve.host": (served, {"serve.host": "127.0.0.2"}),
    "Serve.port": (served, {"serve.port": 9000}),
    "Serve.max_model_len": (served, {"serve.max_model_len": 1024}),
    "Serve.gpu_memory_utilization": (served, {"serve.gpu_memory_utilization": 0.5}),
    "Serve.max_num_seqs": (served, {"serve.max_num_seqs": 16}),
    "Serve.enforce_eager": (served, {"serve.enforce_eager": True}),
    "Serve.concurrency": (planned, {"serve.concurrency": 4}),
    "Serve.max_requests": (served, {"serve.max_requests": 16}),
    "Serve.max_body_bytes": (served, {"serve.max_body_bytes": 1000}),
    "Serve.drain_seconds": (served, {"serve.drain_seconds": 3}),
    "Serve.startup_seconds": ("server/process.py", "self.section.startup_seconds"),
    "Bench.runtimes": ("bench/stage.py", "section.runtimes"),
    "Bench.concurrency": ("bench/stage.py", "section.concurrency"),
    "Bench.output_tokens": ("bench/stage.py", "section.output_tokens"),
    "Bench.repeats": ("bench/stage.py", "section.repeats"),
    "Bench.rounds": ("bench/stage.py", "section.rounds"),
    "Bench.sweep": ("bench/stage.py", "section.sweep"),
    "Bench.price_per_hour": ("bench/stage.py", "section.price_per_hour"),
    "Bench.slo_ttft_seconds": ("bench/stage.py", "section.slo_ttft_seconds"),
    "Bench.slo_tpot_seconds": ("bench/stage.py", "section.slo_tpot_seconds"),
    "Bench.slo_e2e_seconds": ("bench/stage.py", "section.slo_e2e_seconds"),
}


def _sections() -> Iterator[type[Section]]:
    yield from (found for found in vars(schema).values() if isinstance(found, type) and issubclass(found, Section))


def _fields() -> list[str]:
    """All fields of all sections but those that are sections themselves."""
    every = [(section, name, field) for section in _sections() for name, field in section.model_fields.items()]
    whole = {
        "model",
        "quantization",
        "lora",
        "bottleneck",
        "head",
        "layers",
        "loss",
        "preference",
        "feedback",
        "data",
        "ledger",
        "train",
        "evaluate",
        "merge",
        "export",
        "verify",
        "serve",
    }
    inner = {f"Recipe.{name}" for name in (*whole, "bench")}
    return [key for section, name, _ in every if (key := f"{section.__name__}.{name}") not in inner]


# --- what the probes are asked about ------------------------------------------------------------------------------------


def _chat(question: str, answer: str, **columns: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **columns}


LONG = " ".join(f"w{number}" for number in range(80))
FILES: dict[str, list[Any]] = {
    "rows.jsonl": [{**row, "user": f"u{i % 3}", "topic": "abcd"[i % 4]} for i, row in enumerate(chat_rows(24))],
    "other.jsonl": [_chat(f"count to {i}", "one two") for i in range(12)],
    "malformed.jsonl": [_chat("a", "b"), {"nothing": "known"}],
    "roles.jsonl": [
        _chat("a", "b"),
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
    ],
    "unicode.jsonl": [_chat("a", "b"), _chat("c", "d \ufffd e")],
    "empty.jsonl": [_chat("a", "b"), _chat("c", "  ")],
    "twice.jsonl": [_chat("a", "b"), _chat("a", "b")],
    "near.jsonl": [_chat(LONG + " now", "b"), _chat(LONG + " then", "b")],
    "columns.jsonl": [{"q": "a", "a": "b", "prompt": "other", "completion": "one"}],
    "calls.jsonl": [
        {
            "id": "1",
            "question": [[{"role": "user", "content": "weather in Oslo"}]],
            "function": [{"name": "weather", "description": "d", "parameters": {"type": "dict", "properties": {}}}],
        }
    ],
    "accepted.jsonl": [{"id": "1", "ground_truth": [{"weather": {}}]}],
}
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fields")
    for name, rows in FILES.items():
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (made / "text.txt").write_text("one line of text\nanother line of text\n", encoding="utf-8")
    (made / "plain.jinja").write_text(PLAIN, encoding="utf-8")
    return made


def _recipe(folder: Path, tiny_model: Path, probe: Probe, changes: dict[str, Any]) -> Recipe:
    """For the data stage on a tiny model and real files; for anything else on a known model of which nothing is read."""
    rows = probe is data
    raw: dict[str, Any] = {"task": "chat", "model": {"source": str(tiny_model) if rows else "Qwen/Qwen2.5-1.5B"}}
    raw |= {"data": {"train": [{"source": "rows.jsonl"}], **({"max_length": 512} if rows else {})}, "train": {}}
    for key, value in changes.items():
        where, (*sections, last) = raw, key.split(".")
        for section in sections:
            where = where.setdefault(section, {})
        where[last] = value
    placed = json.loads(json.dumps(raw), object_hook=lambda found: _placed(found, folder))
    return from_dict(placed, (), "the test")


def _placed(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = {*FILES, "text.txt", "plain.jinja"}
    return {
        key: str(folder / value) if isinstance(value, str) and value in names else value for key, value in found.items()
    }


# --- the tests ----------------------------------------------------------------------------------------------------------


def test_no_field_is_missing_and_none_is_gone() -> None:
    assert sorted(TABLE) == sorted(_fields())


@pytest.mark.parametrize("field", [name for name, line in TABLE.items() if callable(line[0])])
def test_the_field_changes_something(field: str, folder: Path, tiny_model: Path) -> None:
    probe, change, *rest = TABLE[field]
    assert callable(probe)
    before = rest[0] if rest else {}
    one, other = ({**before}, {**before, **change})  # type: ignore[dict-item]
    found = [probe(_recipe(folder, tiny_model, probe, changes)) for changes in (one, other)]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "field", ["Clean.malformed", "Data.loss", "Lora.r", "Lora.lora_alpha", "Train.optim", "Serve.host", "Export.method"]
)
def test_a_probe_answers_the_same_when_nothing_is_changed(field: str, folder: Path, tiny_model: Path) -> None:
    probe, _, *rest = TABLE[field]
    assert callable(probe)
    before: Any = rest[0] if rest else {}
    assert probe(_recipe(folder, tiny_model, probe, before)) == probe(_recipe(folder, tiny_model, probe, before))


@pytest.mark.parametrize("field", [name for name, line in TABLE.items() if isinstance(line[0], str)])
def test_the_field_is_read_where_the_table_says(field: str) -> None:
    file, words = TABLE[field]
    assert str(words) in (PACKAGE / str(file)).read_text(encoding="utf-8")
