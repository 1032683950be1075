"""The session that runs exported encoders: order, batches, threads, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.heads import rows_of
from qkit.core.errors import DataError, ModelError
from qkit.runtimes import _onnx_encoder
from qkit.runtimes._onnx_encoder import EncoderSession, equal_batches

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`logits`: how many tokens the row has, and their sum with the types; `start_logits`: the tokens."""
    import onnx

    make, value, kinds = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
    names = ("input_ids", "attention_mask", "token_type_ids")
    nodes = [
        make("Add", ["input_ids", "token_type_ids"], ["typed"]),
        make("ReduceSum", ["attention_mask", "one"], ["count"]),
        make("ReduceSum", ["typed", "one"], ["sum"]),
        make("Concat", ["count", "sum"], ["both"], axis=1),
        make("Cast", ["both"], ["logits"], to=kinds.FLOAT),
        make("Cast", ["input_ids"], ["start_logits"], to=kinds.FLOAT),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "sums",
        [value(name, kinds.INT64, ["rows", "length"]) for name in names],
        [
            value("logits", kinds.FLOAT, ["rows", 2]),
            value("start_logits", kinds.FLOAT, ["rows", "length"]),
        ],
        [onnx.numpy_helper.from_array(np.array([1]), "one")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, {"pad": "0", "positions": "50"})
    made = tmp_path_factory.mktemp("sums")
    onnx.save(model, str(made / "model.onnx"))
    return made


def wanted(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    ids, types = row["input_ids"], row.get("token_type_ids", [])
    return [len(ids), sum(ids) + sum(types)], ids


def found(session: EncoderSession, rows: list[dict[str, list[int]]]) -> list[tuple[Any, Any]]:
    return [(one["logits"].tolist(), one["start_logits"].tolist()) for one in session.logits(rows)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_outputs_are_in_the_order_of_the_rows(
    folder: Path, threads: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_encoder, "WINDOW", 7)
    rows = rows_of(40, 9) + rows_of(40, 9, types=True)
    session = EncoderSession(folder, threads=threads, batch_tokens=batch_tokens)
    assert found(session, rows) == [wanted(row) for row in rows]
    assert found(session, rows[::-1]) == [wanted(row) for row in rows[::-1]]
    assert found(session, rows[:1]) == [wanted(rows[0])] and found(session, []) == []
    session.close()


def test_several_threads_may_ask_at_once(folder: Path) -> None:
    session = EncoderSession(folder, threads=2)
    asked = [rows_of(20, 30, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda rows: found(session, rows), asked))
    assert answers == [[wanted(row) for row in rows] for rows in asked]


def test_a_batch_holds_rows_of_one_length_and_every_row_is_in_one() -> None:
    lengths = [len(row["input_ids"]) for row in rows_of(200, 12)]
    batches = list(equal_batches(lengths, 30))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len({lengths[index] for index in batch}) == 1
        assert len(batch) * lengths[batch[0]] <= 30
    first = [lengths[batch[0]] for batch in batches]
    assert first == sorted(first, reverse=True) and len(batches) < 100
    assert list(equal_batches([40], 30)) == [[0]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "row 2 has 0 tokens, and the model takes at least one"), ([5] * 51, "row 2 has 51 tokens, .* at most 50")],
)
def test_a_row_that_the_model_cannot_take_is_named(folder: Path, ids: list[int], message: str) -> None:
    rows = [{"input_ids": [1]}, {"input_ids": [5] * 50}, {"input_ids": ids}]
    session = EncoderSession(folder)
    assert len(found(session, rows[:2])) == 2
    with pytest.raises(DataError, match=message):
        list(session.logits(rows))


def test_a_file_that_is_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not an exported encoder: it has no model.onnx; export it again") as caught:
        EncoderSession(tmp_path)
    assert caught.value.source == tmp_path
    whole = (folder / "model.onnx").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a graph", whole.replace(b"ReduceSum", b"ReduceSun")):
        (tmp_path / "model.onnx").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"damaged or incomplete .*; export it again") as caught:
            EncoderSession(tmp_path)
        assert caught.value.source == tmp_path / "model.onnx"
