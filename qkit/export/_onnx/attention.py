"""Traces attention as one node of ONNX Runtime's own (com.microsoft MultiHeadAttention), for every model that uses transformers' interface.

transformers computes attention, and the mask it needs, with functions that a model looks up by name. Under the name TRACED the functions here
are in their place: they mark one node for the exporter and compute nothing. A model with attention of its own, such as DeBERTa's, is traced
as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from qkit.export._onnx.graph import EditedGraph


TRACED = "qkit_onnx"  # the name of the functions below in transformers' tables


@contextmanager
def traced_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend through the functions here; it cannot be run until the block ends, only traced."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not model._can_set_attn_implementation():
        yield
        return
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(TRACED, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED, _mask)
    model.set_attn_implementation(TRACED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _mask(*, mask_function: Any, attention_mask: Tensor | None, **options: Any) -> Tensor:
    """Return what hides a key: int32 [rows, length] where only padding does, which costs nothing to compute; else a bias to add.

    The bias is [rows, 1, length, length]; it is computed once, for all layers of a kind.
    """
    import torch
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if mask_function is bidirectional_mask_function and attention_mask is not None:
        return attention_mask.to(torch.int32)
    options["allow_is_bidirectional_skip"] = False  # this row's mask hides nothing, another's will
    return eager_mask(mask_function=mask_function, attention_mask=attention_mask, **options)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Return the node's output [rows, length, heads, size]; `query`, `key` and `value` are [rows, heads, length, size]."""
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = getattr(module, "num_key_value_groups", 1)
    flat = [_flat(part) for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    hidden = (None, attention_mask) if attention_mask.dim() == 2 else (None, None, attention_mask)
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (*flat, *hidden),
        {"num_heads": query.shape[1], "scale": float(scaling)},
        dtype=query.dtype,
        shape=flat[0].shape[:2] + flat[2].shape[2:],
        version=1,
    )
    return out.reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _flat(states: Tensor) -> Tensor:
    """Return [rows, length, heads * size] for [rows, heads, length, size]; ONNX Runtime removes this where a model just did the inverse."""
    rows, heads, length, size = states.shape
    return states.transpose(1, 2).reshape(rows, length, heads * size)


def skip_masks(graph: EditedGraph) -> None:
    """Let the graph attend without a mask when a batch has no padding: ONNX Runtime's quick kernel on a CPU takes none.

    Each node with a padding mask becomes one of two, chosen by whether the mask hides anything.
    """
    import numpy as np
    import onnx

    make = onnx.helper.make_node

    def chosen(node: Any) -> list[Any] | None:
        padding = node.input[4] if node.op_type == "MultiHeadAttention" and len(node.input) == 5 else ""
        if not padding:
            return None
        before, condition = [], f"{padding}.hides_nothing"
        if condition not in made:
            one = graph.add(f"{padding}.one", np.int32(1))
            before = [
                make("ReduceMin", [padding], [f"{padding}.least"], keepdims=0),
                make("Equal", [f"{padding}.least", one], [condition]),
            ]
            made.add(condition)
        branches = {"then_branch": _branch(node, node.input[:3]), "else_branch": _branch(node, node.input)}
        return [*before, make("If", [condition], list(node.output), node.name, **branches)]

    made: set[str] = set()
    graph.replace(chosen)


def _branch(node: Any, inputs: Any) -> Any:
    """Return a graph of one node: `node` with these inputs."""
    import onnx

    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    output = f"{node.output[0]}.{len(inputs)}"
    del inner.input[:], inner.output[:]
    inner.input.extend(inputs)
    inner.output.append(output)
    value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    return onnx.helper.make_graph([inner], output, [], [value])
