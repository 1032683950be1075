"""Rounding to few bits: the arithmetic, the bytes as ONNX Runtime reads them, and the walk through a model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

SHAPES = [(4, 16, 64), (4, 32, 96), (4, 32, 80), (8, 32, 96), (8, 16, 40), (4, 64, 576)]


def matrix(outputs: int, inputs: int, seed: int = 0) -> Any:
    import torch

    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def gram_of_related_inputs(inputs: int) -> Any:
    """Inputs that lie near a space of an eighth of their dimensions, as real ones do."""
    few = matrix(400, inputs // 8, 1) @ matrix(inputs // 8, inputs, 2)
    states = few + 0.3 * matrix(400, inputs, 3)
    return states.t() @ states


def output_error(weight: Any, rounded: Any, gram: Any) -> float:
    off = weight - rounded.weight()
    return float(((off @ gram) * off).sum() / ((weight @ gram) * weight).sum())


def product_in_onnx_runtime(rounded: Any) -> Any:
    """The identity times the matrix, as a MatMulNBits node says it in fp32."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from qkit.export._onnx.matmul_nbits import tensors

    inputs = rounded.codes.shape[1]
    names = ("codes", "scales", "zeros")
    values = {"K": inputs, "N": len(rounded.codes), "bits": rounded.grid.bits, "block_size": rounded.grid.block}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", accuracy_level=1, **values)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(rounded.codes)])],
        [numpy_helper.from_array(array, name) for name, array in zip(names, tensors(rounded), strict=True)],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0]


@pytest.mark.parametrize(("bits", "block", "inputs"), SHAPES)
def test_onnx_runtime_reads_the_weights_that_were_meant(bits: int, block: int, inputs: int) -> None:
    from qkit.export._onnx.gptq import nearest

    rounded = nearest(matrix(24, inputs) + 0.3, bits, block)
    assert len(rounded.codes.unique()) > 2**bits // 2
    np.testing.assert_array_equal(product_in_onnx_runtime(rounded).T, rounded.weight().numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_come_back(bits: int) -> None:
    from qkit.export._onnx.matmul_nbits import pack, unpack

    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 7, 9), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 7, -(-9 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, 9), codes)


@pytest.mark.parametrize(("bits", "block", "inputs"), SHAPES)
def test_no_weight_within_the_grid_is_off_by_more_than_half_a_step(bits: int, block: int, inputs: int) -> None:
    from qkit.export._onnx.gptq import nearest

    weight = matrix(24, inputs)
    rounded = nearest(weight, bits, block)
    scales, _ = rounded.grid.spread(inputs)
    inside = (rounded.codes > 0) & (rounded.codes < rounded.grid.top)
    assert bool(((weight - rounded.weight()).abs()[inside] <= 0.5001 * scales[inside]).all())
    assert float((weight - rounded.weight()).norm() / weight.norm()) < (0.1 if bits == 4 else 0.007)


def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.export._onnx import gptq

    weight = matrix(24, 96)
    whole = gptq.nearest(weight, 4, 32)
    monkeypatch.setattr(gptq, "ELEMENTS", 5 * 96)
    parts = gptq.nearest(weight, 4, 32)
    assert bool((whole.codes == parts.codes).all())
    assert bool((whole.grid.scales == parts.grid.scales).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_that_spans_a_grid_stays_as_it_is(bits: int) -> None:
    import torch

    from qkit.export._onnx.gptq import Grid, Rounded, nearest

    top = 2**bits - 1
    codes = (matrix(24, 96) * top / 4 + top / 2).round().clamp(0, top)
    codes[:, ::32], codes[:, 1::32] = 0, top
    grid = Grid(matrix(24, 3).abs() + 0.1, torch.full((24, 3), 5.0), bits, 32)
    weight = Rounded(codes, grid).weight()
    torch.testing.assert_close(nearest(weight, bits, 32).weight(), weight, atol=1e-5, rtol=1e-5)


def test_zeros_stay_zeros() -> None:
    from qkit.export._onnx.gptq import nearest

    assert float(nearest(matrix(4, 64) * 0, 4, 32).weight().abs().max()) == 0


def test_compensation_lowers_the_error_of_what_comes_out() -> None:
    from qkit.export._onnx.gptq import gptq, nearest

    weight, gram = matrix(48, 192), gram_of_related_inputs(192)
    plain = output_error(weight, nearest(weight, 4, 32), gram)
    assert output_error(weight, gptq(weight, gram, 4, 32), gram) < 0.4 * plain


def test_there_is_nothing_to_compensate_between_unrelated_inputs() -> None:
    import torch

    from qkit.export._onnx.gptq import gptq, nearest

    weight = matrix(24, 96)
    assert bool((gptq(weight, torch.eye(96), 4, 32).codes == nearest(weight, 4, 32).codes).all())


def test_inputs_that_never_come_do_no_harm() -> None:
    from qkit.export._onnx.gptq import gptq

    weight, gram = matrix(24, 96), gram_of_related_inputs(96)
    gram[40:50], gram[:, 40:50] = 0, 0
    assert bool(gptq(weight, gram, 4, 32).weight().isfinite().all())
    assert bool(gptq(weight, gram * 0, 4, 32).weight().isfinite().all())


ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [200, 3, 77], list(range(20, 60))]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.mark.parametrize("budget", [1, 64, 1024])
def test_the_walk_says_what_the_model_says(
    tiny_model: Path, reference: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qkit.export._onnx import layers as _onnx_layers

    monkeypatch.setattr(_onnx_layers, "BATCH_TOKENS", budget)
    layers = list(_onnx_layers.Layers(tiny_model, ROWS).walk())
    last = _onnx_layers.Layers(tiny_model, ROWS).walk()
    next(last)
    states = [row[real] for batch in next(last).forward() for row, real in zip(batch.states, batch.real, strict=True)]
    assert len(layers) == reference.config.num_hidden_layers
    with torch.no_grad():
        for row, found in zip(sorted(ROWS, key=len), states, strict=True):
            expected = reference.lm_head(reference.model.norm(found))
            torch.testing.assert_close(expected, reference(torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


def test_grams_are_sums_over_real_inputs(tiny_model: Path, reference: Any) -> None:
    import torch

    from qkit.export._onnx.layers import Layers

    names = ("self_attn.q_proj", "mlp.down_proj")
    seen: dict[str, Any] = dict.fromkeys(names, 0)
    for name in names:

        def hook(_: Any, inputs: Any, name: str = name) -> None:
            seen[name] = seen[name] + inputs[0][0].t() @ inputs[0][0]

        reference.model.layers[0].get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in ROWS:
            reference(torch.tensor([row]))
    grams = next(Layers(tiny_model, ROWS).walk()).grams(names)
    for name, gram in grams.items():
        torch.testing.assert_close(gram, seen[name], atol=1e-3, rtol=1e-4)
        assert gram.norm() > 0


def test_what_is_put_into_a_layer_counts_for_the_next(tiny_model: Path) -> None:
    from qkit.export._onnx.layers import Layers

    def second(change: bool) -> Any:
        walk = Layers(tiny_model, ROWS).walk()
        first = next(walk)
        if change:
            first.module.mlp.down_proj.weight.data *= 2
        return next(walk).batches[0].states

    assert float((second(True) - second(False)).abs().max()) > 1e-3


def test_layers_read_what_the_model_gives_them(tmp_path: Path) -> None:
    """Granite multiplies what is embedded, within its forward."""
    import torch
    from transformers import GraniteConfig, GraniteForCausalLM

    from qkit.export._onnx.layers import Layers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GraniteForCausalLM(
        GraniteConfig(vocab_size=64, num_key_value_heads=2, embedding_multiplier=12.0, **sizes)
    ).eval()
    model.save_pretrained(tmp_path)
    row = [5, 6, 7, 8]
    with torch.no_grad():
        wanted = model(torch.tensor([row]), output_hidden_states=True).hidden_states
    for layer in Layers(tmp_path, [row]).walk():
        (batch,) = layer.batches
        torch.testing.assert_close(batch.states[0], wanted[layer.index][0], atol=1e-5, rtol=1e-4)


def test_models_of_another_make_are_not_walked(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from qkit.export._onnx.layers import walkable

    assert walkable(tiny_model)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert not walkable(tmp_path)
