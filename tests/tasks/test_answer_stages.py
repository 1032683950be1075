"""The task `answer` from records to gated ONNX on tiny models, and its figures, steps and answers by other means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from helpers.first_step import first_step
from helpers.paths import ROOT
from helpers.served import KEY, serving
from helpers.tiny_answers import answer_run, nested, question, questions
from helpers.tiny_labelled import build_model
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import StageFailed
from qkit.measure import label_contract
from qkit.model import load
from qkit.model.adapters import new_heads
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.load import load as load_recipe
from qkit.recipe.schema import Loss
from qkit.run.directory import Run
from qkit.tasks._answering import spans, squad
from qkit.tasks._answering.usage import usage
from qkit.train import losses
from qkit.train.trainers import labelled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")]
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")
HELD_OUT = 24
ROWS = {"v1": questions(240), "v2": questions(260, unanswered=3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **QUIET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Mapping[str, Run]:
    """A run with and one without questions that have no answer, through all stages; the former has validation rows. Not to be changed."""
    runs = {}
    for kind, made in ROWS.items():
        train = {"max_steps": 300, "learning_rate": 3e-3, "save_steps": 300}
        export = {"formats": ["onnx-fp32", "onnx-int8"]}
        root = tmp_path_factory.mktemp(kind)
        parts = {"train": f"{HELD_OUT}:240", **({"validation": "240:"} if kind == "v2" else {})}
        more = {name: [{"source": str(root / "rows.jsonl"), "rows": part}] for name, part in parts.items()}
        run = answer_run(
            root, model, made, HELD_OUT, method="full", train=train, export=export, data={"max_length": 14, **more}
        )
        for stage in STAGES:
            pipeline.execute(run, stage)
        runs[kind] = run
    return runs


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def lines_of(run: Run, artifact: str = "trained") -> list[dict[str, Any]]:
    lines = (run.folder("evaluate") / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["artifact"] == artifact]


# --- through all stages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_artifacts_answer_with_the_threshold_that_was_chosen(finished: Mapping[str, Run], kind: str) -> None:
    run, task = finished[kind], open_task("answer")
    folders = [run.folder("merge"), *(run.folder("export") / name for name in run.recipe.export.formats)]
    chosen = run.tuned().get("threshold")
    assert (chosen is None) == (kind == "v1") and chosen != 0
    for folder in folders:
        service: Any = task.service(folder, run.recipe.data.max_length)
        assert service.threshold == chosen, folder


def test_a_server_gives_the_answers_of_the_artifact(finished: Mapping[str, Run], tmp_path: Path) -> None:
    """Each question alone over HTTP, long contexts in windows, and no answer where the threshold says so."""
    run = finished["v2"]
    with serving(tmp_path, run.root) as served:
        headers = {"Authorization": f"Bearer {KEY}"}
        for line, row in zip(lines_of(run), ROWS["v2"][:HELD_OUT], strict=True):
            body = {"question": row["question"], "context": row["context"]}
            answer = httpx.post(f"{served.url}/answer", json={"input": body}, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            (said,) = answer.json()["data"]
            assert said["answer"] == line["prediction"]
    assert len({line["prediction"] for line in lines_of(run)}) > 2


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_figures_are_those_of_the_predictions(finished: Mapping[str, Run], kind: str) -> None:
    run, held_out = finished[kind], ROWS[kind][:HELD_OUT]
    lines, scores = lines_of(run), read(run.folder("evaluate") / "scores.json")
    assert len(lines) == HELD_OUT == scores["scores"]["trained"]["rows"]
    pairs = [(line["prediction"], row["answers"]["text"]) for line, row in zip(lines, held_out, strict=True)]
    right = [squad.exact(*pair) for pair in pairs]
    trained, baseline = (scores["scores"][name] for name in ("trained", "majority"))
    assert [line["correct"] for line in lines] == right and scores["metric"] == "exact match"
    assert trained["score"] == pytest.approx(100 * sum(right) / HELD_OUT) and trained["score"] > 70
    assert trained["metrics"]["f1"]["value"] == pytest.approx(sum(squad.f1(*pair) for pair in pairs) / HELD_OUT)
    assert scores["gain"]["points"] == pytest.approx(trained["score"] - baseline["score"]) and scores["gain"]["low"] > 0
    for line, row in zip(lines, held_out, strict=True):
        begin = line["answer_start"]
        assert line["prediction"] == ("" if begin is None else row["context"][begin : begin + len(line["prediction"])])
    if kind == "v2":
        assert baseline["score"] == pytest.approx(100 * sum(not true for _, true in pairs) / HELD_OUT)
        answered = [one for one, (_, true) in zip(right, pairs, strict=True) if true]
        assert trained["metrics"]["has_answer_exact"]["value"] == pytest.approx(sum(answered) / len(answered))
        assert all((line["no_answer"] > scores["tuned"]["threshold"]) == (line["prediction"] == "") for line in lines)
    else:
        assert "tuned" not in scores and all(line["prediction"] for line in lines)


def test_the_threshold_is_chosen_on_validation_rows(finished: Mapping[str, Run]) -> None:
    run = finished["v2"]
    task, chosen = open_task("answer"), read(run.folder("evaluate") / "scores.json")["tuned"]["threshold"]
    records = pq.read_table(run.folder("data") / "validation.parquet").to_pylist()
    with open_runtime("transformers", run.folder("merge"), detect(), head=task.HEAD) as runtime:
        asked = spans.answered(runtime, [task.row(record) for record in records], 30)
    references = [row["answers"]["text"] for row in ROWS["v2"][240:]]
    assert len(asked) == len(references) == 20 and chosen == pytest.approx(spans.threshold(asked, references), abs=1e-3)
    assert chosen != 0


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_artifacts_pass_their_gates(finished: Mapping[str, Run], kind: str) -> None:
    run = finished[kind]
    parity = read(run.folder("verify") / "parity.json")
    entries = {name: entry for name, entry in parity["parity"].items() if name != "trained"}
    assert {name: (entry["status"], entry["failed"]) for name, entry in entries.items()} == {
        name: ("passed", []) for name in ("merged", "onnx-fp32", "onnx-int8")
    }
    assert entries["onnx-fp32"]["kl_mean"] < 1e-7 < entries["onnx-int8"]["kl_mean"] < 0.05
    rows = len(pq.read_table(run.folder("data") / "test.parquet"))
    assert rows == 2 * HELD_OUT
    for name, entry in entries.items():
        assert (entry["rows"], entry["tokens"]) == (rows, 2 * rows) and entry["over"] == "all tokens of the row"
        assert {check["name"]: check["status"] for check in entry["contract"]} == {
            "tokens": "ok",
            "labels": "ok",
            "padding": "ok",
        }
        assert parity["scores"][name]["rows"] == HELD_OUT
    trained = read(run.folder("evaluate") / "scores.json")["scores"]["trained"]
    assert parity["scores"]["onnx-fp32"]["score"] == trained["score"]


def test_another_tokenizer_breaks_the_contract(finished: Mapping[str, Run], tmp_path: Path) -> None:
    run = finished["v1"]
    folder = shutil.copytree(run.folder("merge"), tmp_path / "merged")
    content = read(folder / "tokenizer.json")
    words = content["model"]["vocab"]
    words["ban"], words["den"] = words["den"], words["ban"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    checks = {check.name: check for check in label_contract.check_folder(run, folder).checks}
    assert [name for name, check in checks.items() if check.status != "ok"] == ["tokens"]
    assert "the ids differ from training" in checks["tokens"].detail


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_plain_transformers_gives_the_same_logits_and_answers(finished: Mapping[str, Run], kind: str) -> None:
    run, task = finished[kind], open_task("answer")
    plain = transformers.AutoModelForQuestionAnswering.from_pretrained(run.folder("merge")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder("merge"))
    assert (plain.config.id2label, plain.config.num_labels) == ({0: "start", 1: "end"}, 2)
    records = pq.read_table(run.folder("data") / "test.parquet").to_pylist()
    with open_runtime("transformers", run.trained(), detect(), head=task.HEAD) as runtime:
        ours = list(runtime.logits([task.row(record) for record in records]))
    settings = {"truncation": "only_second", "max_length": 14, "stride": 4, "return_overflowing_tokens": True}
    place = 0
    for row, line in zip(ROWS[kind][:HELD_OUT], lines_of(run), strict=True):
        batch = tokenizer(
            row["question"], row["context"], return_offsets_mapping=True, padding=True, return_tensors="pt", **settings
        )
        with torch.no_grad():
            outputs = plain(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        best = (-1e9, "")
        for window in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][window].sum())
            theirs = torch.stack([outputs.start_logits[window], outputs.end_logits[window]], -1)[:length]
            assert torch.allclose(torch.from_numpy(ours[place]), theirs, atol=1e-4)
            place += 1
            inside = [i for i, side in enumerate(batch.sequence_ids(window)) if side == 1]
            for first in inside:
                for last in [i for i in inside if first <= i < first + 30]:
                    begin, end = batch["offset_mapping"][window][first][0], batch["offset_mapping"][window][last][1]
                    best = max(best, (float(theirs[first, 0] + theirs[last, 1]), row["context"][begin:end]))
        assert line["prediction"] in (best[1], *([""] if kind == "v2" else []))
    assert place == len(records)


@pytest.mark.parametrize(("library", "folder"), [("transformers", "merge"), ("onnx", "export/onnx-fp32")])
def test_the_card_shows_what_works(
    finished: Mapping[str, Run],
    library: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished["v1"]
    card = (run.root / folder / "README.md").read_text(encoding="utf-8")
    assert usage(library, run.recipe).strip() in card
    monkeypatch.chdir(run.root / folder)
    program = card.split("```python\n")[1].split("```")[0]
    for row, line in zip(ROWS["v1"][:6], lines_of(run), strict=False):
        asked = f'question, context = "{row["question"]}", "{row["context"]}"'
        lines = [asked if text.startswith("question, context = ") else text for text in program.splitlines()]
        assert asked in lines
        exec(compile("\n".join(lines), "card", "exec"), {})
        assert capsys.readouterr().out.startswith(f"{line['prediction']} | no answer is better by ")


def test_there_is_no_pipeline_for_questions() -> None:
    """If transformers has one again, the card and the documentation can say so."""
    with pytest.raises(KeyError, match="question-answering"):
        transformers.pipeline("question-answering")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [8, 12])
def test_a_step_is_that_of_plain_transformers(model: Path, tmp_path: Path, words: int) -> None:
    """On rows of one length: transformers' own loss takes padding for places where an answer could be."""
    rows = questions(60, unanswered=5, words=words)
    run = answer_run(tmp_path, model, rows, method="full", train={"max_steps": 1}, data={"max_length": 32})
    pipeline.execute(run, "data")
    trainer: Any = labelled.build_trainer(run, model, detect(), tmp_path)
    batch = trainer.collate([{**trainer.train_dataset[n], "row": n} for n in next(iter(trainer.batches()))])
    assert batch["attention_mask"].all() and len(batch["labels"]) > 4
    same = transformers.AutoModelForQuestionAnswering.from_config(trainer.model.config)
    same.load_state_dict(trainer.model.state_dict())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    theirs = same.train()(**inputs, start_positions=batch["labels"][:, 0], end_positions=batch["labels"][:, 1]).loss
    theirs.backward()
    ours = first_step(trainer)
    assert ours.loss == pytest.approx(theirs.item(), abs=1e-5)
    assert max(float(p.grad.abs().max()) for p in same.parameters() if p.grad is not None) > 1e-2
    for name, parameter in same.named_parameters():
        assert torch.allclose(ours.gradients[name], parameter.grad, rtol=0, atol=1e-5), name


def longest_last(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss of one's own: finite also where padding is."""
    return -(logits.log_softmax(-1).exp().gather(1, labels[:, None])[:, 0])


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", f"{__name__}:longest_last"])
def test_gradients_do_not_depend_on_the_accumulation(model: Path, tmp_path: Path, loss: str) -> None:
    """Eight windows of unlike lengths in one batch, one by one, and in parts of a batch."""
    steps = []
    for number, (rows, accumulation, parts) in enumerate(((8, 1, 1), (1, 8, 1), (8, 1, 3))):
        data = [question(i, words=6 + i % 5, answered=i % 3 > 0) for i in range(8)]
        run = answer_run(
            tmp_path / str(number), model, data, 0, method="full", loss={"name": loss}, micro_batches=parts,
            data={"max_length": 32, "batch_rows": rows, "batch_tokens": 512},
            train={"max_steps": 1, "gradient_accumulation_steps": accumulation},
        )  # fmt: skip
        pipeline.execute(run, "data")
        steps.append(first_step(labelled.build_trainer(run, model, detect(), tmp_path / str(number))))
    assert max(float(gradient.abs().max()) for gradient in steps[0].gradients.values()) > 1e-4
    for step in steps[1:]:
        assert step.loss == pytest.approx(steps[0].loss, abs=1e-6)
        for name, gradient in steps[0].gradients.items():
            assert torch.allclose(step.gradients[name], gradient, atol=1e-6), name


def test_padding_is_no_place_for_an_answer(model: Path) -> None:
    """Also for losses that multiply probabilities with their logarithms."""
    task: Any = open_task("answer")

    class Outputs:
        start_logits = torch.tensor([[1.0, 2.0, 50.0], [1.0, 2.0, 3.0]])
        end_logits = torch.tensor([[2.0, 1.0, 50.0], [1.0, 2.0, 3.0]])

    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "labels": torch.tensor([[1, 0], [0, 2]])}
    ours = task.losses(Outputs(), batch, losses.open_loss(Loss(), Path()))
    plain = torch.nn.functional.cross_entropy
    first = 2 * plain(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    second = plain(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])) + plain(
        torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2])
    )
    assert torch.allclose(ours, torch.stack([first, second]))
    logits = []
    task.losses(Outputs(), batch, lambda given, labels: logits.append(given) or labels.float())
    entropy = (logits[0].log_softmax(-1) * logits[0].softmax(-1)).sum(-1)
    assert logits[0].shape == (4, 3) and bool(torch.isfinite(entropy).all())


def test_two_labels_of_each_window_are_counted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions(64, unanswered=4)
    train = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}
    run = answer_run(tmp_path / "a", model, rows, data={"max_length": 14}, train=train, ledger={"losses": True})
    pipeline.execute(run, "data")
    pipeline.execute(run, "train")
    sums = read(run.folder("train") / "sums.json")
    windows = len(pq.read_table(run.folder("data") / "train.parquet"))
    assert windows == 80 and sums["ledger_labelled_tokens"] == 2 * windows
    assert {sums[name] for name in ("drawn_labelled_tokens", "in_batches", "divided_by")} == {4 * windows}
    kept = pq.read_table(run.folder("train") / "losses.parquet").to_pylist()
    assert len(kept) == windows and sum(row["loss_after"] for row in kept) < sum(row["loss_before"] for row in kept)
    task = type(open_task("answer"))
    whole = task.collate

    def shifted(self: Any, rows: Any, pad: int, packed: bool = False) -> Any:
        batch = whole(self, rows, pad, packed)
        return {**batch, "labels": batch["labels"] + 1}

    monkeypatch.setattr(task, "collate", shifted)
    other = answer_run(tmp_path / "b", model, rows, data={"max_length": 14}, train=train)
    pipeline.execute(other, "data")
    with pytest.raises(StageFailed, match="ids disagree"):
        pipeline.execute(other, "train")


@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_an_adapter_reads_token_types(model: Path, tmp_path: Path, method: str) -> None:
    """PEFT's own model for questions would drop them."""
    run = answer_run(tmp_path, model, questions(48), method=method)
    pipeline.execute(run, "data")
    trainer: Any = labelled.build_trainer(run, model, detect(), tmp_path)
    batch = trainer.collate([{**trainer.train_dataset[0], "row": 0}])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        ours, plain = (of.eval()(**inputs).start_logits for of in (trainer.model, trainer.base_model))
        without = trainer.model(**{**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}).start_logits
    assert torch.equal(ours, plain) and not torch.allclose(ours, without, atol=1e-3)


# --- methods ----------------------------------------------------------------------------------------------------------

CASES = [
    ("lora", "bert", False), ("lora", "roberta", False), ("lora", "distilbert", False), ("lora", "modernbert", False),
    ("lora", "llama", False), ("head", "bert", False), ("full", "deberta-v2", False), ("houlsby", "bert", False),
    ("lora", "bert", True),
]  # fmt: skip


@pytest.mark.parametrize(("method", "kind", "four_bit"), CASES)
def test_methods_and_models(tmp_path: Path, method: str, kind: str, four_bit: bool) -> None:
    """Trained for a few steps, exported and verified; LoRA is on no part of the head."""
    folder = build_model(tmp_path / "model", kind, **({} if kind == "distilbert" else {"initializer_range": 0.1}))
    if four_bit:
        pytest.importorskip("bitsandbytes")
    formats = ["onnx-fp32", "onnx-int8"] if kind == "bert" and not four_bit else []
    run = answer_run(
        tmp_path, folder, questions(64, unanswered=4), method=method, quantization={"load_in_4bit": four_bit},
        train={"max_steps": 20, "learning_rate": 1e-2}, export={"formats": formats}, data={"max_length": 14},
    )  # fmt: skip
    merges = method != "houlsby"
    for stage in ("data", "train", "evaluate", *(["merge"] if merges else []), "export", "verify"):
        pipeline.execute(run, stage)
    parity = read(run.folder("verify") / "parity.json")["parity"]
    judged = {
        name: (entry["status"], entry["failed"]) for name, entry in parity.items() if name != run.recipe.trained_as
    }
    assert judged == {name: ("passed", []) for name in [*(["merged"] if merges else []), *formats]}
    if method == "lora":
        config = read(run.trained() / "adapter_config.json")
        assert config["task_type"] == "QUESTION_ANS"
        base = load.load_base(folder, run.recipe, detect(), ("start", "end"))
        heads = new_heads.of(base, folder)
        assert base.config.num_labels == 2 and {*heads} <= {*config["modules_to_save"]}
        tensors = load_file(run.trained() / "adapter_model.safetensors")
        assert len(tensors) > 8 and not [
            key for key in tensors if "lora" in key and any(f".{head}." in key for head in heads)
        ]
    metrics = [json.loads(line) for line in (run.folder("train") / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["loss"] for line in metrics[-5:]) < sum(line["loss"] for line in metrics[:5])


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_runs(tmp_path: Path, model: Path) -> None:
    """With its own settings, on a small file in SQuAD's layout and a tiny model, for a few steps."""
    recipe = yaml.safe_load((ROOT / "recipes" / "answer-squad.yaml").read_text(encoding="utf-8"))
    for name, rows in (("train", questions(48)), ("test", [question(i) for i in range(100, 112)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(nested(rows)), encoding="utf-8")
        recipe["data"][name] = [{"source": str(tmp_path / f"{name}.json")}]
    recipe["model"]["source"] = str(model)
    recipe["data"] |= {"max_length": 14, "stride": 4, "batch_tokens": 256}
    recipe["train"] |= {"max_steps": 4}
    recipe["train"].pop("num_train_epochs")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run = Run.create(tmp_path / "run", load_recipe(tmp_path / "recipe.yaml"))
    for stage in STAGES:
        pipeline.execute(run, stage)
    summary = read(run.folder("data") / "summary.json")
    assert summary["splits"]["test"]["records"] == 12
    assert not [check["message"] for check in summary["checks"] if check["status"] == "fail"]
    assert {path.name for path in run.folder("export").glob("onnx*")} == {"onnx-fp32", "onnx-int8"}
    assert [*run.folder("report").iterdir()]
