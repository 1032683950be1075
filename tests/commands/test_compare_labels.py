"""`qkit verify A B` for models with labels: figures that agree with the run's own, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.tiny_labelled import build_model, labelled_run
from qkit import pipeline
from qkit.commands import compare, compare_screen, where_layers_part
from qkit.core.errors import DataError, NotDeployable
from qkit.core.progress import Progress
from qkit.run.directory import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run through `verify`. Not to be changed."""
    root = tmp_path_factory.mktemp("run")
    model = build_model(root / "model", "bert", initializer_range=0.1)
    train = {"max_steps": 40, "learning_rate": 1e-2, "save_steps": 40}
    finished = labelled_run(root, model, train=train, export={"formats": ["onnx-int8"]})
    for stage in ("data", "train", "evaluate", "merge", "export", "verify"):
        pipeline.execute(finished, stage)
    return finished


def compared(a: Path, b: Path) -> compare.Comparison:
    one, other = compare.side(str(a)), compare.side(str(b))
    return compare.compare(one, other, compare.comparison_rows(one, other, None, Progress()), Progress())


def test_a_run_and_its_export_are_as_far_apart_as_verify_measured(run: Run) -> None:
    parity = json.loads((run.folder("verify") / "parity.json").read_text(encoding="utf-8"))
    comparison = compared(run.root, run.folder("export") / "onnx-int8")
    measured = parity["parity"]["onnx-int8"]
    assert comparison.kl_mean == pytest.approx(measured["kl_mean"], rel=1e-3, abs=1e-9) and comparison.rows == 24
    assert comparison.score["b"] == pytest.approx(parity["scores"]["onnx-int8"]["score"])
    assert comparison.loss_b == pytest.approx(measured["heldout_loss"], rel=1e-4)
    assert comparison.unit == "labels" and comparison.metric == "accuracy"
    lines = dict(compare_screen._lines(comparison))
    assert lines["predictions"] == f"{comparison.identical} identical" and "perplexity" not in lines


def test_a_folder_that_no_run_made(run: Run, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(run.folder("merge"), tmp_path / "bare"))
    comparison = compared(run.folder("merge"), bare)
    assert (comparison.kl_mean, comparison.identical, comparison.score["points"]) == (0.0, 24, 0.0)


def test_labels_in_another_order_are_not_compared(run: Run, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(run.folder("merge"), tmp_path / "bare"))
    names = json.loads((bare / "labels.json").read_text(encoding="utf-8"))
    (bare / "labels.json").write_text(json.dumps({**names, "names": names["names"][::-1]}), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"the labels of the two models differ: as label 0, .* has 'fruit' and .* has 'wood'"
    ):
        compared(run.folder("merge"), bare)


def test_what_cannot_be_compared(run: Run) -> None:
    one, server = compare.side(str(run.root)), compare.side("http://127.0.0.1:9/v1")
    rows = compare.comparison_rows(one, server, None, Progress())
    with pytest.raises(DataError, match="a server of labels is not compared with a model; `qkit verify RUN --server"):
        compare.compare(one, server, rows, Progress())
    with pytest.raises(NotDeployable, match="has labels"):
        where_layers_part.need_torch(one, one)
