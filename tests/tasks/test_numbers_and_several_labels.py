"""The tasks `multi_label` and `regress`: from records to gated ONNX on tiny models, and their numbers by other means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits

from helpers.first_step import first_step
from helpers.pages import Page
from helpers.schemas import SHOW_SCHEMA, closed
from helpers.tiny_labelled import TELLING, build_model, labelled_run, settings, text, write_rows
from qkit import pipeline
from qkit.core.device import detect
from qkit.core.errors import RecipeError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.plugins.task import open_task
from qkit.recipe.labels import Loss
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data
from qkit.report import model_card
from qkit.report import summary as report_summary
from qkit.run.directory import Run
from qkit.tasks._encoder import numbers, several_labels
from qkit.tasks._encoder.labelled_text import numbers_of, several_names
from qkit.train import losses
from qkit.train.trainers import labelled

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
STAGES = ("data", "train", "evaluate", "merge", "export", "verify", "bench", "report")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert", **QUIET)


def several(number: int) -> dict[str, Any]:
    """A text that has a label for each telling word in it: none, one, or both."""
    first, second = number % 2, number // 2 % 2
    words = [*text(number).split(), *([TELLING[1]] if first else []), *([TELLING[2]] if second else [])]
    kept = [word for word in words if word not in TELLING] + [TELLING[1]] * first + [TELLING[2]] * second
    return {"text": " ".join(kept), "labels": ["pear"] * first + ["plum"] * second}


def scored(number: int) -> dict[str, Any]:
    """A text whose number its telling word decides."""
    return {"text": text(number), "score": (number % 3) - 1.0 + (number % 5) / 50}


ROWS = {"multi_label": [several(i) for i in range(96)], "regress": [scored(i) for i in range(96)]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Mapping[str, Run]:
    """A run of each task through all stages. Not to be changed."""
    runs = {}
    for task, rows in ROWS.items():
        train = {"max_steps": 80, "learning_rate": 3e-3, "save_steps": 80}
        export = {"formats": ["onnx-fp32", "onnx-int8"]}
        run = labelled_run(
            tmp_path_factory.mktemp(task), model, rows=rows, task=task, method="full", train=train, export=export
        )
        for stage in STAGES:
            pipeline.execute(run, stage)
        runs[task] = run
    return runs


def lines_of(run: Run, artifact: str = "trained") -> list[dict[str, Any]]:
    lines = (run.folder("evaluate") / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["artifact"] == artifact]


def scores_of(run: Run) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((run.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))
    return scores


# --- through all stages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_f1_of_several_labels_is_that_of_its_predictions(finished: Mapping[str, Run]) -> None:
    run = finished["multi_label"]
    scores = scores_of(run)
    said = [set(json.loads(line["prediction"])) for line in lines_of(run)]
    true = [set(row["labels"]) for row in ROWS["multi_label"][:24]]
    right = sum(len(one & other) for one, other in zip(said, true, strict=True))
    f1 = 2 * right / (sum(map(len, said)) + sum(map(len, true)))
    trained = scores["scores"]["trained"]
    assert (scores["metric"], trained["score"]) == ("micro F1", pytest.approx(100 * f1))
    assert trained["low"] <= trained["score"] <= trained["high"] and f1 > 0.9
    exact = sum(one == other for one, other in zip(said, true, strict=True)) / 24
    assert trained["metrics"]["exact_match"]["value"] == pytest.approx(exact)
    assert [line["correct"] for line in lines_of(run)] == [one == other for one, other in zip(said, true, strict=True)]
    assert scores["gain"]["low"] > 0
    before = scores["scores"]["majority"]["score"]
    assert scores["gain"]["points"] == pytest.approx(trained["score"] - before)


@pytest.mark.slow
def test_figures_of_numbers_are_those_of_its_predictions(finished: Mapping[str, Run]) -> None:
    run = finished["regress"]
    said = np.array([float(line["prediction"]) for line in lines_of(run)])
    true = np.array([row["score"] for row in ROWS["regress"][:24]])
    trained = scores_of(run)["scores"]["trained"]
    r2 = 1 - ((said - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    assert trained["score"] == pytest.approx(100 * r2) and r2 > 0.8
    wanted = {
        "mse": ((said - true) ** 2).mean(),
        "mae": np.abs(said - true).mean(),
        "pearson": np.corrcoef(said, true)[0, 1],
    }
    assert {name: trained["metrics"][name]["value"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    loss = ((said - true) ** 2).mean() / 2 + math.log(2 * math.pi) / 2
    assert trained["heldout_loss"] == pytest.approx(loss, abs=1e-5)
    mean = np.mean([row["score"] for row in ROWS["regress"][24:]])
    baseline = scores_of(run)["scores"]["majority"]
    assert baseline["metrics"]["mse"]["value"] == pytest.approx(((true - mean) ** 2).mean(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi_label", "regress"])
def test_plain_transformers_gives_the_same(finished: Mapping[str, Run], task: str) -> None:
    """A pipeline takes from config.json what the outputs mean."""
    run = finished[task]
    pipe = transformers.pipeline("text-classification", model=str(run.folder("merge")), device="cpu", top_k=None)
    for line, row, answer in zip(
        lines_of(run), ROWS[task], pipe([row["text"] for row in ROWS[task][:24]]), strict=False
    ):
        by_name = {one["label"]: one["score"] for one in answer}
        if task == "regress":
            assert by_name == {"value": pytest.approx(float(line["prediction"]), abs=1e-4)}
        else:
            assert {n: p for n, p in by_name.items() if p > 0.5} == pytest.approx(line["probabilities"], abs=1e-4), row


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi_label", "regress"])
def test_artifacts_pass_their_gates(finished: Mapping[str, Run], task: str) -> None:
    run = finished[task]
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))
    assert {name: entry["status"] for name, entry in parity["parity"].items() if name != "trained"} == {
        "merged": "passed", "onnx-fp32": "passed", "onnx-int8": "passed",
    }  # fmt: skip
    assert parity["parity"]["onnx-fp32"]["kl_mean"] < 1e-8 < parity["parity"]["onnx-int8"]["kl_mean"] < 0.05
    assert parity["scores"]["onnx-fp32"]["score"] == pytest.approx(
        scores_of(run)["scores"]["trained"]["score"], abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "sections", "figure"),
    [("multi_label", {"labels"}, "macro F1"), ("regress", {"numbers", "errors"}, "mean absolute error")],
)
def test_reports_and_cards_have_what_the_task_shows(
    finished: Mapping[str, Run], task: str, sections: set[str], figure: str
) -> None:
    run = finished[task]
    seen = Page((run.folder("report") / "index.html").read_text(encoding="utf-8"))
    ids = {attributes["id"] for tag, attributes in seen.tags if tag == "section"}
    assert sections <= ids and ("answers" in ids) is (task == "multi_label")
    document = report_summary.summary(run)
    jsonschema.Draft202012Validator(closed(SHOW_SCHEMA)).validate(document)
    metrics = document["scores"]["merged"]["metrics"].values()
    shown = next(entry for entry in metrics if entry["title"] == figure)
    card = huggingface_hub.ModelCard(model_card.render(run)).data.eval_results or ()
    by_name = {result.metric_name: result.metric_value for result in card}
    assert by_name[figure] == pytest.approx(shown["value"] * (100 if shown["share"] else 1))
    assert ("worst_labels" in document["scores"]["trained"]) is (task == "multi_label")


@pytest.mark.slow
def test_a_spoilt_regressor_is_seen(finished: Mapping[str, Run], tmp_path: Path) -> None:
    """Rows whose squared error grew count as lost, whatever the sign of the error."""
    from qkit.measure import gates, scores
    from qkit.measure.held_out import held_out_of

    run = finished["regress"]
    held_out, task = held_out_of(run), open_task("regress")
    texts = [line["prediction"] for line in lines_of(run)]
    moved = scores.grade([repr(float(t) + 1.0) for t in texts], held_out, task, run.recipe.evaluate)
    change = gates.change_from_reference(run, moved, held_out)
    assert change.worse(0.95) and gates.gain_over_reference(run, moved, held_out)["high"] < 0
    same = gates.change_from_reference(run, scores.grade(texts, held_out, task, run.recipe.evaluate), held_out)
    assert (same.lost, same.gained) == (0, 0)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi_label", "regress"])
def test_a_step_is_that_of_plain_transformers(model: Path, tmp_path: Path, task: str) -> None:
    """transformers' model computes the loss of its problem_type by itself."""
    run = labelled_run(tmp_path, model, rows=ROWS[task], task=task, method="full", train={"max_steps": 1})
    pipeline.execute(run, "data")
    trainer: Any = labelled.build_trainer(run, model, detect(), tmp_path)
    batch = trainer.collate([{**trainer.train_dataset[n], "row": n} for n in next(iter(trainer.batches()))])
    del batch["rows"], batch["lengths"]
    same = transformers.AutoModelForSequenceClassification.from_config(trainer.model.config)
    same.load_state_dict(trainer.model.state_dict())
    theirs = same.train()(**{**batch, "labels": batch["labels"][:, 0] if task == "regress" else batch["labels"]}).loss
    theirs.backward()
    ours = first_step(trainer)
    assert ours.loss == pytest.approx(theirs.item(), abs=1e-6)
    assert (
        max(float(parameter.grad.abs().max()) for parameter in same.parameters() if parameter.grad is not None) > 1e-2
    )
    for name, parameter in same.named_parameters():
        assert torch.allclose(ours.gradients[name], parameter.grad, rtol=0, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi_label", "regress"])
def test_rows_are_counted_and_their_labels_summed(model: Path, tmp_path: Path, task: str, monkeypatch: Any) -> None:
    train = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}
    run = labelled_run(tmp_path / "a", model, rows=ROWS[task], task=task, train=train)
    pipeline.execute(run, "data")
    pipeline.execute(run, "train")
    sums = json.loads((run.folder("train") / "sums.json").read_text(encoding="utf-8"))
    assert {sums[name] for name in ("drawn_labelled_tokens", "in_batches", "divided_by")} == {144}, sums
    collate = labelled.CountedLabels.collate

    def spoilt(self: Any, rows: Any) -> Any:
        batch = collate(self, rows)
        batch["labels"][0, 0] += 0.5
        return batch

    monkeypatch.setattr(labelled.CountedLabels, "collate", spoilt)
    other = labelled_run(tmp_path / "b", model, rows=ROWS[task], task=task, train=train)
    pipeline.execute(other, "data")
    with pytest.raises(Exception, match="label ids disagree"):
        pipeline.execute(other, "train")


def test_weights_of_several_labels_are_pos_weights(tmp_path: Path) -> None:
    content = {"names": ["a", "b"], "rows": {"train": {"a": 2, "b": 5}}, "training_rows": 10}
    (tmp_path / "labels.json").write_text(json.dumps(content), encoding="utf-8")
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2), torch.randint(0, 2, (6, 2)).float()
    for given, weights in (("balanced", [4.0, 1.0]), ({"a": 3.0}, [3.0, 1.0])):
        ours = losses.open_loss(Loss(name="bce", class_weights=given), tmp_path)(logits, labels)
        pos_weight = torch.tensor(weights)
        assert torch.allclose(
            ours, binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=pos_weight)
        )
    smooth = losses.open_loss(Loss(name="bce", label_smoothing=0.2), tmp_path)(logits, labels)
    assert torch.allclose(smooth, binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1, reduction="none"))


def test_a_label_of_every_row_still_counts(tmp_path: Path) -> None:
    content = {"names": ["a", "b"], "rows": {"train": {"a": 10, "b": 2}}, "training_rows": 10}
    (tmp_path / "labels.json").write_text(json.dumps(content), encoding="utf-8")
    weights = losses.positive_weights(Loss(name="bce", class_weights="balanced"), tmp_path)
    assert weights is not None and weights.tolist() == [pytest.approx(0.1), 4.0]


def test_huber_is_linear_beyond_delta(tmp_path: Path) -> None:
    loss = losses.open_loss(Loss(name="huber", delta=0.5), tmp_path)
    errors = torch.tensor([[0.25], [3.0]])
    assert loss(errors, torch.zeros_like(errors)).tolist() == [[0.25**2 / 2], [pytest.approx(0.5 * (3 - 0.25))]]


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_probabilities_of_several_labels_stay_finite() -> None:
    logp = several_labels.log_probabilities(np.array([-200.0, 0.0, 200.0], np.float32))
    assert logp.tolist() == [[0.0, -200.0], [pytest.approx(math.log(0.5))] * 2, [-200.0, 0.0]]


def test_r2_of_the_score_is_that_of_the_metrics() -> None:
    from qkit.plugins.resampling import figures

    rng = np.random.default_rng(0)
    true = rng.normal(size=(30, 2)) * [1, 5] + [100, -3]
    said = true + rng.normal(size=(30, 2))
    texts = [" ".join(map(repr, map(float, row))) for row in said]
    every = figures(numbers.figures_of_numbers(texts, true.tolist(), ["value_0", "value_1"]))
    score = figures(numbers.explained(texts, true.tolist()))["score"]
    assert score == pytest.approx((every["r2:value_0"] + every["r2:value_1"]) / 2)
    assert every["r2:value_0"] == pytest.approx(
        1 - ((said - true)[:, 0] ** 2).sum() / ((true - true.mean(0))[:, 0] ** 2).sum()
    )


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "separator", "names"),
    [
        (["b", "a"], None, ("b", "a")),
        ("a|b", "|", ("a", "b")),
        ("a| |b|a", "|", ("a", "b")),
        ('["a, b", "c"]', None, ("a, b", "c")),
        ("a, b", None, ("a, b",)),
        ("", None, ()),
        (None, None, ()),
        ([], None, ()),
    ],
)
def test_names_of_several_labels(value: Any, separator: str | None, names: tuple[str, ...]) -> None:
    assert several_names(value, "label", Data(label_separator=separator)) == names


@pytest.mark.parametrize(("value", "texts"), [(3, ("3.0",)), ("1e-3", ("0.001",)), ([1, 2.5], ("1.0", "2.5"))])
def test_numbers_are_read(value: Any, texts: tuple[str, ...]) -> None:
    assert numbers_of(value, "label", Data()) == texts


@pytest.mark.parametrize("value", ["", "three", None, True, math.nan, "inf", [], [1, "x"], {"a": 1}])
def test_what_is_no_number_is_refused(value: Any) -> None:
    from qkit.plugins.example import RowError

    with pytest.raises(RowError, match=r"label (is not a|has no) number"):
        numbers_of(value, "label", Data())


def prepared(folder: Path, model: Path, task: str, rows: Any) -> tuple[dict[str, Any], Path]:
    file = write_rows(folder / "rows.jsonl", rows)
    recipe = from_dict({**settings(model, file, task=task), "task": task}, (), "the test")
    (folder / "out").mkdir()
    return data_stage.prepare(recipe, folder / "out", Progress()), folder / "out"


@pytest.mark.parametrize(
    ("task", "change", "check", "status", "said"),
    [
        ("regress", {30: {"score": [1.0, 2.0]}}, "labels", "fail", "1 rows have another number of labels"),
        ("regress", {i: {"score": 2} for i in range(96)}, "numbers", "fail", "all 72 training rows have the same number"),
        ("regress", {i: {"score": i * 1000} for i in range(96)}, "numbers", "warn", "standard deviation 2.078e+04"),
        ("regress", {31: {"text": text(30)}}, "label_conflicts", "warn", "1 texts have different numbers"),
        ("regress", {}, "numbers", "pass", "on average"),
        ("multi_label", {2: {"labels": ["cherry"]}}, "labels", "fail", "labels that no training row has: cherry"),
        ("multi_label", {i: {"labels": []} for i in range(96)}, "labels", "fail", "the training rows have no label"),
        ("multi_label", {41: {"text": several(40)["text"]}}, "label_conflicts", "warn", "1 text"),
        ("multi_label", {}, "labels", "pass", "2 labels, with 36 to 36 training rows each"),
    ],
)  # fmt: skip
def test_checks_of_the_set(
    model: Path, tmp_path: Path, task: str, change: Any, check: str, status: str, said: str
) -> None:
    rows = [{**row, **change.get(index, {})} for index, row in enumerate(ROWS[task])]
    summary, _ = prepared(tmp_path, model, task, rows)
    found = next(one for one in summary["checks"] if one["name"] == check)
    assert (found["status"], said in found["message"]) == (status, True), found


def test_prepared_rows_have_ones_and_numbers(model: Path, tmp_path: Path) -> None:
    for task, rows in ROWS.items():
        (tmp_path / task).mkdir()
        _, out = prepared(tmp_path / task, model, task, rows)
        made = pq.read_table(out / "train.parquet").to_pylist()
        for row, record in zip(made, rows[24:], strict=True):
            wanted = (
                [record["score"]] if task == "regress" else [float(n in record["labels"]) for n in ("pear", "plum")]
            )
            assert row["labels"] == pytest.approx(wanted)


def test_a_text_that_begins_like_a_list_is_named(model: Path, tmp_path: Path) -> None:
    rows = [{"text": text(i), "labels": "[a, b" if i == 50 else '["a"]'} for i in range(60)]
    summary, _ = prepared(tmp_path, model, "multi_label", rows)
    (failed,) = (check for check in summary["checks"] if check["status"] == "fail")
    assert failed["name"] == "malformed" and "begins like a JSON list" in failed["message"] and failed["found"] == 1


@pytest.mark.parametrize(
    ("task", "section", "said"),
    [
        ("regress", {"loss": {"name": "cross_entropy"}}, "the losses of task=regress are mse, huber"),
        ("regress", {"loss": {"class_weights": "balanced"}}, "loss.class_weights=balanced applies to"),
        ("multi_label", {"loss": {"name": "focal"}}, "the losses of task=multi_label are bce"),
        ("classify", {"loss": {"name": "mse"}}, "the losses of task=classify are cross_entropy, focal"),
        ("classify", {"data": {"label_separator": "|"}}, "data.label_separator is for task=multi_label"),
    ],
)
def test_settings_of_other_tasks_are_refused(model: Path, tmp_path: Path, task: str, section: Any, said: str) -> None:
    raw = settings(model, write_rows(tmp_path / "rows.jsonl", ROWS["regress"]), task=task, **section)
    with pytest.raises(RecipeError, match=said):
        from_dict({**raw, "task": task}, (), "the test")
