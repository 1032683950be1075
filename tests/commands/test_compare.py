"""Any two artifacts, on the same rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.command import qkit_here
from helpers.tiny import chat_rows
from qkit.commands import compare, where_layers_part
from qkit.core.errors import DataError, MissingArtifact, NotDeployable, ParityFailed
from qkit.core.files import write_json
from qkit.core.progress import Progress
from qkit.core.sequences import first_difference
from qkit.run.directory import Run


def compared(a: object, b: object, data: Path | None = None) -> compare.Comparison:
    one, other = compare.side(str(a)), compare.side(str(b))
    return compare.compare(one, other, compare.comparison_rows(one, other, data, Progress()), Progress())


def test_a_run_stands_for_its_live_adapter_and_its_held_out_rows(trained_run: Run) -> None:
    found = compared(trained_run.root, trained_run.folder("merge"))
    assert found.rows == 4 and found.on.endswith("data/test.parquet") and found.over == "all tokens"
    assert 0 <= found.kl_mean < 1e-3 and found.kl_mean <= found.kl_p99 <= found.kl_max and found.top1 > 0.9
    assert found.perplexity_b == pytest.approx(found.perplexity_a, rel=0.02)
    assert found.score["points"] == found.score["b"] - found.score["a"]
    assert {check.status for check in found.checks} == {"ok", "noted", "not checked"}
    found.enforce(1e-3)
    with pytest.raises(ParityFailed, match=r"merge is \S+ nats per token from .*run; --max-kl allows 1e-09"):
        found.enforce(1e-9)


def test_a_model_is_no_distance_from_itself_and_some_from_another(tiny_model: Path, trained_run: Run) -> None:
    same = compared(trained_run.folder("merge"), trained_run.folder("merge"))
    assert same.kl_max == 0 and same.top1 == 1 and same.identical == 4 and same.parting is None
    base = compared(tiny_model, trained_run.folder("merge"))
    assert base.kl_mean > 0.1 and base.loss_b < base.loss_a and base.identical < 4 and base.parting is not None


def test_rows_of_a_file_are_tokenized_as_the_run_does(trained_run: Run, tmp_path: Path) -> None:
    """The run's system turn and template; a bare folder's own."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(3)), encoding="utf-8")
    one = compare.side(str(trained_run.root))
    asked = compare.comparison_rows(one, one, file, Progress())
    kept = compare.comparison_rows(one, one, trained_run.folder("data") / "test.parquet", Progress())
    assert [row.input_ids for row in asked.held_out.rows] == [row.input_ids for row in kept.held_out.rows[:3]]
    bare = compare.side(str(shutil.copytree(trained_run.folder("merge"), tmp_path / "bare")))
    plain = compare.comparison_rows(bare, bare, file, Progress())
    assert len(plain.held_out.rows[0].input_ids) < len(asked.held_out.rows[0].input_ids)
    assert plain.stop == asked.stop


def test_what_an_export_says_it_is_opens_it(trained_run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(trained_run.folder("merge"), tmp_path / "export")
    write_json(folder / "qkit.json", {"format": "onnx-int4"})
    found = compare.side(str(folder))
    assert (found.runtime, found.export_format, found.run) == ("onnxruntime", "onnx-int4", None)
    with pytest.raises(NotDeployable, match="is onnx-int4, and layers can only be read from models"):
        where_layers_part.need_torch(found)
    with pytest.raises(NotDeployable, match="is a server"):
        where_layers_part.need_torch(compare.side("http://127.0.0.1:8000/v1"))
    assert compare.side("http://127.0.0.1:8000/v1").url == "http://127.0.0.1:8000"


def test_what_cannot_be_compared_says_so(tiny_model: Path, trained_run: Run, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="pass the run directory that contains it"):
        compare.side(str(trained_run.folder("train") / "adapter"))
    with pytest.raises(MissingArtifact, match="not a run directory, a model folder, an export"):
        compare.side(str(tmp_path))
    model = compare.side(str(tiny_model))
    with pytest.raises(DataError, match=r"set --data to a file of conversations or to RUN/data/test\.parquet"):
        compare.comparison_rows(model, model, None, Progress())


def test_rows_that_are_not_compared_on_are_said(tiny_model: Path, rows_file: Path) -> None:
    with rows_file.open("a", encoding="utf-8") as file:
        file.write(rows_file.read_text(encoding="utf-8"))
    model = compare.side(str(tiny_model))
    asked = compare.comparison_rows(model, model, rows_file, Progress())
    assert len(asked.held_out.rows) == 24
    assert asked.where == f"{rows_file}; 24 of 48 records are dropped (duplicate 24): see `qkit inspect`"


@pytest.mark.parametrize(
    ("a", "b", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([4], [5], 0)]
)
def test_where_two_answers_part(a: list[int], b: list[int], place: int | None) -> None:
    assert first_difference(a, b) == place


def test_the_command(trained_run: Run, tiny_model: Path) -> None:
    """The table and the walk on stdout, and exit code 2 beyond --max-kl."""
    done = qkit_here("verify", tiny_model, trained_run.folder("merge"), "--where", "--max-kl", "0.1")
    assert done.returncode == 2 and "--max-kl allows 0.1" in done.stderr
    assert "KL(A || B)" in done.stdout and "They differ first at layer 0" in done.stdout
    three = qkit_here("verify", "a", "b", "c")
    assert three.returncode == 2 and "name a run, two artifacts to compare" in three.stderr


def test_a_place_differs_by_what_rounding_cannot_explain() -> None:
    assert not where_layers_part.LayerPlace("layer 9", 0.016, 0.013).differs
    assert where_layers_part.LayerPlace("layer 9", 0.05, 0.013).differs
    assert (
        not where_layers_part.LayerPlace("norm", 0.004, 0.0).differs
        and where_layers_part.LayerPlace("norm", float(np.nan), 0.01).differs
    )
