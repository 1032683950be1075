"""The wording of messages, in one place: every message that real code produces here stands in golden/messages.json, so that a change of wording
is one diff to read. Other tests match the fields of errors.

    python tests/test_messages.py    writes the golden file anew
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.commands.housekeeping import listing, removal
from qkit.commands.talk import speakers, typed
from qkit.commands.talk import targets as talk_targets
from qkit.commands.talk.job import Job
from qkit.core import files, sources
from qkit.core.errors import QkitError, listed, nearest
from qkit.measure.evidence import Breach
from qkit.plan import gpus
from qkit.plan import plan as plan_plan
from qkit.plugins.example import RowError
from qkit.plugins.task import open_task
from qkit.recipe.load import from_dict, load
from qkit.recipe.schema import Data
from qkit.run.directory import Run

GOLDEN = Path(__file__).parent / "golden" / "messages.json"
RECIPE: Mapping[str, Any] = {
    "task": "chat",
    "model": {"source": "org/model"},
    "data": {"train": [{"source": "org/rows"}]},
}

# Changes of a recipe that is otherwise right, each of which makes it wrong.
CHANGES = {
    "unknown key": ["train.learning_rat=1"],
    "wrong type": ["train.learning_rate=fast"],
    "true for a number": ["serve.port=true"],
    "a fraction of a step": ["train.warmup_steps=2.5"],
    "no steps": ["train.max_steps=0"],
    "unknown task": ["task=chatt"],
    "unknown format": ["export.formats=[onnx-int5]"],
    "a batch shorter than a row": ["data.batch_tokens=5"],
    "a short context": ["serve.max_model_len=16"],
    "4-bit merge of a 16-bit base": ["quantization.load_in_4bit=false", "merge.base=dequantized"],
    "micro batches of packs": ["micro_batches=2", "data.packing=true"],
    "the head as a target": ["lora.target_modules=[lm_head]"],
    "no target": ["lora.target_modules=[]"],
    "all-linear in a list": ["lora.target_modules=[all-linear]"],
    "fractions": ["data.split={train: 0.5, test: 0.2}"],
    "a bench of nothing": ["bench.runtimes=[vllm-w4a16]"],
    "a pattern": ["evaluate.answer_pattern=("],
    "a long warm-up": ["train.max_steps=4", "train.warmup_steps=10"],
    "late logs": ["train.max_steps=4", "train.logging_steps=9"],
    "an entry that a schedule lacks": ["train.lr_scheduler_kwargs={num_cycle: 2}"],
    "an entry of a schedule without any": [
        "train.lr_scheduler_type=linear",
        "train.lr_scheduler_kwargs={min_lr: 1.0e-6}",
    ],
    "a value that an entry does not take": ["train.lr_scheduler_kwargs={num_cycles: 0}"],
    "a floor that is not said": ["train.lr_scheduler_type=cosine_with_min_lr"],
    "a floor above the ceiling": [
        "train.lr_scheduler_type=cosine_with_min_lr",
        "train.lr_scheduler_kwargs={min_lr: 1.0}",
    ],
    "a slow root": ["train.lr_scheduler_type=inverse_sqrt"],
    "a decay that is not said": ["train.lr_scheduler_type=warmup_stable_decay"],
    "a long decay": [
        "train.max_steps=10",
        "train.warmup_steps=3",
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.lr_scheduler_kwargs={num_decay_steps: 8}",
    ],
    "phases that are too short": [
        "train.max_steps=10",
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.lr_scheduler_kwargs={num_decay_steps: 3, num_stable_steps: 4}",
    ],
    "a curve of no warm-up": [
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.lr_scheduler_kwargs={num_decay_steps: 3, warmup_type: cosine}",
    ],
    "cycles of a line": [
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.lr_scheduler_kwargs={num_decay_steps: 3, decay_type: linear, num_cycles: 1}",
    ],
    "many restarts": [
        "train.max_steps=10",
        "train.lr_scheduler_type=cosine_with_restarts",
        "train.lr_scheduler_kwargs={num_cycles: 30}",
    ],
    "a plateau without a metric": ["train.lr_scheduler_type=reduce_lr_on_plateau"],
    "a low-rank optimizer": ["train.optim=galore_adamw"],
    "a layerwise optimizer": ["train.optim=lomo"],
    "an optimizer of a TPU": ["train.optim=adamw_torch_xla"],
    "an optimizer without a schedule": ["train.optim=schedule_free_adamw"],
    "betas of SGD": ["train.optim=sgd", "train.adam_beta1=0.8"],
    "an argument that an optimizer lacks": ["train.optim=sgd", "train.optim_args=momentun=0.9"],
    "a value that an argument does not take": ["train.optim=sgd", "train.optim_args=momentum=2"],
    "Nesterov without momentum": ["train.optim=sgd", "train.optim_args=nesterov=true"],
    "constant with warm-up": ["train.lr_scheduler_type=constant", "train.warmup_steps=2"],
    "an unknown tracker": ["train.report_to=[tensorbord]"],
    "smoothing and dft": ["train.loss_type=dft", "train.label_smoothing_factor=0.1"],
    "smoothing of labels": ["task=classify", "train.label_smoothing_factor=0.1"],
    "dft of labels": ["task=classify", "train.loss_type=dft"],
    "no validation rows": ["train.early_stopping_patience=2"],
    "no evaluation": ["data.validation=[{source: v.jsonl}]", "train.eval_strategy=no", "train.eval_steps=5"],
    "steps of an epoch": ["data.validation=[{source: v.jsonl}]", "train.eval_strategy=epoch", "train.eval_steps=5"],
    "steps without a number": ["data.validation=[{source: v.jsonl}]", "train.eval_strategy=steps"],
    "a threshold alone": ["train.early_stopping_threshold=0.1"],
    "an unknown figure": ["data.validation=[{source: v.jsonl}]", "train.metric_for_best_model=bleu"],
    "a score of no rows": ["data.validation=[{source: v.jsonl}]", "train.metric_for_best_model=score"],
    "a hash of a hub id": [f"model.sha256={'a' * 64}"],
    "streaming a file": ["data.train=[{source: rows.jsonl, streaming: true}]"],
    "packs of pairs": ["task=preference", "data.packing=true"],
    "the loss of more than the answers": ["task=preference", "data.loss=all"],
    "an unknown loss of pairs": ["task=preference", "preference.loss_type=dpo"],
    "the logarithm of no smoothing": ["task=preference", "preference.loss_type=exo_pair"],
    "pairs of a chat": ["preference.beta=0.5"],
    "all weights in 4 bits": ["method=full"],
    "a method of labels": ["method=head"],
    "named weights without method=full": ["train.trainable=[norm]"],
    "an adapter in fp32": ["train.bf16=false"],
    "layers without method=full": ["layers.frozen=2"],
    "a kind that is not said": ["method=peft"],
    "a prompt": ["method=peft", "peft={peft_type: PROMPT_TUNING}"],
    "pissa on 4 bits": ["lora.init_lora_weights=pissa"],
    "loftq on 16 bits": ["lora.init_lora_weights=loftq", "quantization.load_in_4bit=false"],
    "a start of no name": ["lora.init_lora_weights=pisa"],
    "two starts": ["lora.init_lora_weights=eva", "lora.init_from=runs/first"],
    "a delimiter of JSON lines": ["data.train=[{source: rows.jsonl, delimiter: ';'}]"],
    "not an override": ["train.max_steps"],
    "not a section": ["task.name=x"],
}
# Records that no format takes, or that cannot be trained on.
RECORDS: Mapping[str, Any] = {
    "no known columns": {"foo": 1},
    "no answer": {"messages": [{"role": "user", "content": "a"}]},
    "unknown role": {"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "content that is not text": {"prompt": 5, "completion": "b"},
    "an empty answer": {"prompt": "a", "completion": " "},
    "two questions": {"messages": [{"role": role, "content": "a"} for role in ("user", "user", "system", "assistant")]},
    "labels of another length": {"input_ids": [1, 2], "labels": [1]},
}
PAIRS: Mapping[str, Any] = {
    "no rejected answer": {"prompt": "a", "chosen": "b"},
    "no prompt": {"chosen": "a", "rejected": "b"},
    "no common prompt": {
        side: [{"role": role, "content": side} for role in ("user", "assistant")] for side in ("chosen", "rejected")
    },
    "the same answer": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "an empty side": {"prompt": "a", "chosen": "b", "rejected": " "},
}
BREACHES = {
    "kl_mean": Breach("kl_mean", 0.2, 0.1),
    "score": Breach("score", -6.0, 0.0),
    "opens": Breach("opens", detail="out of memory"),
    "lost": Breach("lost", 0.1, 0.2),
}


def _of(make: Callable[[], object]) -> str:
    try:
        return f"no error: {make()}"
    except (QkitError, RowError) as error:
        return f"{type(error).__name__}: {error}"


def messages(folder: Path) -> dict[str, str]:
    """Every message by what it is about; `folder`, whose name is taken out of them, is empty."""
    (folder / "twice.yaml").write_text("task: chat\ntask: chat\n")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("")
    (folder / "damaged.json").write_text("{")
    (folder / "rows.jsonl").write_text("{}")
    files_of_folders = {
        "adapter/adapter_config.json": "{}",
        "labels/config.json": '{"architectures": ["BertForSequenceClassification"]}',
        "begun/recipe.yaml": json.dumps(RECIPE),
        "foreign/recipe.yaml": json.dumps(RECIPE),
        "foreign/run.json": "{}",
        "foreign/notes.txt": "",
    }
    for name, content in files_of_folders.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    task = open_task("chat")
    found = {
        f"recipe: {name}": _of(lambda c=c: from_dict(json.loads(json.dumps(RECIPE)), c, "r.yaml"))
        for name, c in CHANGES.items()
    }
    found |= {f"row: {name}": _of(lambda r=r: task.example(r, None, "auto", Data())) for name, r in RECORDS.items()}
    pairs = open_task("preference")
    found |= {f"pair: {name}": _of(lambda r=r: pairs.example(r, None, "auto", Data())) for name, r in PAIRS.items()}
    found |= {
        f"check: {name}": json.dumps([kind.passes, kind.problem, kind.remedy], ensure_ascii=False)
        for name, kind in {**task.CHECKS, **pairs.CHECKS}.items()
    }
    found |= {f"gate: {name}": breach.message for name, breach in BREACHES.items()}
    places: dict[str, Callable[[], object]] = {
        "recipe: a key twice": lambda: load(folder / "twice.yaml"),
        "recipe: a list": lambda: load(folder / "list.yaml"),
        "recipe: a data file": lambda: load(folder / "rows.jsonl"),
        "recipe: missing": lambda: load(folder / "no.yaml"),
        "run: not one": lambda: Run.open(folder / "other"),
        "run: other files": lambda: Run.create(folder / "other", from_dict(dict(RECIPE), [], "r.yaml")),
        "run: a missing artifact": lambda: Run(folder / "run", from_dict(dict(RECIPE), [], "r.yaml")).need(
            "train", "adapter"
        ),
        "source: nothing there": lambda: sources.locate(str(folder / "nothing")),
        "source: pypi": lambda: sources.locate("pypi:name"),
        "file: damaged": lambda: files.read(folder / "damaged.json"),
        "plan: unknown card": lambda: gpus.device("rtx-9999"),
        "plan: memory": lambda: plan_plan.device_for(None, "much"),
        "talk: unknown command": lambda: typed.read("/rege a"),
        "talk: no file": lambda: typed.read("/save"),
        "talk: no parameter": lambda: speakers.parameters({"top_p": 0}),
        "talk: nothing there": lambda: talk_targets.opened(Job(str(folder / "nothing"))),
        "talk: no model": lambda: talk_targets.opened(Job(str(folder / "other"))),
        "talk: an adapter": lambda: talk_targets.opened(Job(str(folder / "adapter"))),
        "talk: labels": lambda: talk_targets.opened(Job(str(folder / "labels"))),
        "talk: a run without a model": lambda: talk_targets.opened(Job(str(folder / "begun"))),
        "runs: nothing there": lambda: listing.roots([folder / "nothing"]),
        "runs: not one": lambda: removal.doomed([folder / "other"]),
        "runs: other files": lambda: removal.doomed([folder / "foreign"]),
        "nearest": lambda: nearest("optimm", ["optim"]),
        "listed": lambda: listed(["b", "a"]),
    }
    found |= {name: _of(make) for name, make in places.items()}
    cwd = str(Path.cwd())
    return {name: text.replace(str(folder), "FOLDER").replace(cwd, "CWD") for name, text in sorted(found.items())}


def test_the_wording_is_that_of_the_golden_file(tmp_path: Path) -> None:
    assert messages(tmp_path) == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(messages(Path(temporary)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
