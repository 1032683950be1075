"""Exports a model with a head for classification, tagging or extractive answers to ONNX, in fp32.

    input_ids, attention_mask, token_type_ids (where the model knows several types) [rows, length], int64
        ->  logits [rows, labels] or [rows, length, labels];  or start_logits and end_logits [rows, length]

Rows are padded on the right with the model's padding token. What a reader of the file must know beside the graph is in its metadata: `pad`,
the padding token, and `positions`, the longest row where positions are learnt.

torch's exporter traces the model, with attention as one node of ONNX Runtime's own (attention.py); ONNX Runtime then folds constants and fuses
what it can, once, so that the file holds the graph that runs. Two of its fusions are left out, see runtimes/_onnx_encoder.py.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError, NotDeployable
from qkit.export._onnx.attention import skip_masks, traced_attention
from qkit.export._onnx.graph import EditedGraph
from qkit.export._onnx.trace import reason
from qkit.runtimes._onnx_encoder import SLOW_FUSIONS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


ROWS, LENGTH = 3, 7  # sizes of the traced inputs; all above 1, which the tracer would take for a constant
OUTPUTS = ("logits", "start_logits", "end_logits")


@dataclass(frozen=True)
class Traced:
    """What the graph takes and gives. `inputs`: the sample to trace with."""

    inputs: dict[str, Tensor]
    outputs: list[str]


def export_encoder(model: PreTrainedModel, out: Path) -> Path:
    """Write `out/model.onnx`, beside it `model.onnx.data` if the weights exceed 2 GB; return the file. `out` is made if it is missing.

    Raises:
        ModelError: the model is not in fp32, or has no padding token.
        NotDeployable: it has no head that is known here, or cannot be traced.
    """
    model.eval()
    _check(model)
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".onnx-") as folder:
        program = _program(model, Path(folder))
        graph = EditedGraph.read(_fused(program))
    skip_masks(graph)
    graph.describe({"pad": str(model.config.get_text_config().pad_token_id), **_positions(model)})
    return graph.save(out)


def _check(model: PreTrainedModel) -> None:
    import torch

    source = model.config.name_or_path or type(model).__name__
    if dtypes := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        message = f"{source}: onnx-fp32 takes a model in float32, and this one has weights in {dtypes.pop()}; load it with dtype float32"
        raise ModelError(message, source=source)
    if model.config.get_text_config().pad_token_id is None:
        message = f"{source}: its config.json names no pad_token_id, so rows of a batch cannot be padded; set it to a token that no text has"
        raise ModelError(message, source=source)


def _program(model: PreTrainedModel, folder: Path) -> Path:
    """Trace the model with dynamic rows and lengths into `folder`.

    Not optimized by the exporter: ONNX Runtime does that next, and onnxscript's optimizer takes a norm's epsilon of 1e-8 for zero.
    """
    import torch
    from torch.export import Dim

    traced = _sample(model)
    axes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in traced.inputs}
    try:
        with warnings.catch_warnings(), traced_attention(model):
            warnings.simplefilter("ignore")  # torch warns of what its own code does
            program = torch.onnx.export(
                _head_only(model, traced.outputs), (), kwargs=traced.inputs, dynamic_shapes=axes,
                output_names=traced.outputs, dynamo=True, optimize=False, verbose=False,
            )  # fmt: skip
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of any type: the tracer runs the model's own code
        raise NotDeployable(f"{type(model).__name__} cannot be traced: {reason(error)}.") from error
    program.save(folder / "traced.onnx", external_data=True)
    return folder / "traced.onnx"


def _head_only(model: PreTrainedModel, outputs: list[str]) -> Any:
    """Return a module that gives the named outputs only, in that order, and keeps no keys and values of a decoder."""
    import torch

    options = {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", False) else {}

    class Headed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            given = self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **options)
            return tuple(given[name] for name in outputs)

    return Headed().eval()


def _sample(model: PreTrainedModel) -> Traced:
    """Return inputs to trace with, and which outputs the model gives for them."""
    import torch

    config = model.config.get_text_config()
    ids = torch.full((ROWS, LENGTH), (config.pad_token_id + 1) % config.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    with torch.inference_mode():
        given = model(**inputs)
    outputs = [name for name in OUTPUTS if name in given]
    if not outputs:
        raise NotDeployable(f"{type(model).__name__} has no head that qkit exports: it gives {', '.join(given)}.")
    return Traced(inputs, outputs)


def _positions(model: PreTrainedModel) -> dict[str, str]:
    """Return the longest row that learnt positions reach, if the model has them. RoBERTa counts from its padding token."""
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return {"positions": str(module.num_embeddings - unused)}
    return {}


def _fused(file: Path) -> Path:
    """Let ONNX Runtime fold constants and fuse nodes; return the file with the result, which any of its builds for CPUs can open."""
    import onnxruntime

    fused = file.with_name("fused.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    options.log_severity_level = (
        3  # it warns that the file is for machines like this one, which holds for one level above this
    )
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{fused.name}.data")
    onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOW_FUSIONS)
    )
    return fused
