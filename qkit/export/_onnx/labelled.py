"""The ONNX formats of models with a new head: fp32, and 8 bits calibrated on the run's own rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qkit.core.device import detect
from qkit.core.errors import NotDeployable
from qkit.export._onnx import builder
from qkit.model.load import class_of, load_reference
from qkit.plugins.exporter import Job
from qkit.plugins.task import LABELS, open_task
from qkit.recipe.registry import is_unmerged
from qkit.recipe.schema import Recipe
from qkit.tasks._encoder.tagging import transitions
from qkit.tensors.companions import copy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALIBRATION_ROWS = 256


def export(job: Job, out: Path, variant: str) -> None:
    """Make the folder `out`: the graph, config.json with the labels, the tokenizer, and what of the head is not in the graph.

    Raises:
        NotDeployable: there is no such variant, or the model cannot be traced.
    """
    from qkit.export._onnx.encoder import export_encoder
    from qkit.export._onnx.int8 import quantize_int8

    if variant not in ("fp32", "int8"):
        raise NotDeployable(
            f"onnx-{variant}: models with labels have onnx-fp32 and onnx-int8", export_format=f"onnx-{variant}"
        )
    with (
        builder.reporting_full_disk(out.parent),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch,
    ):
        folder = Path(scratch) / "complete"
        model = loaded(job)
        graph = export_encoder(model, folder if variant == "fp32" else Path(scratch) / "fp32")
        if variant == "int8":
            quantize_int8(graph.parent, folder, calibration_rows(job.rows))
        model.config.save_pretrained(str(folder))
        copy_tokenizer(job.merged, folder)
        (folder / LABELS).write_bytes((job.adapter / LABELS).read_bytes())
        transitions.write(model, folder)
        folder.rename(out)


def loaded(job: Job) -> PreTrainedModel:
    """The model to export, in fp32: the merged one, or the base with the adapter that no weight can take up."""
    import torch

    head = open_task(job.recipe.task).HEAD
    if is_unmerged(job.recipe):
        return _as_one(load_reference(job.base, job.recipe, detect(), job.adapter).float(), job.recipe)
    model = class_of(job.merged, head).from_pretrained(str(job.merged), dtype=torch.float32)
    transitions.add_stored(model, job.merged)
    return model.eval()


def _as_one(model: Any, recipe: Recipe) -> PreTrainedModel:
    """A model with an adapter, as one graph. PEFT adds most kinds of adapter to the weights; the gates measure whether that is the same.

    Raises:
        NotDeployable: what was learned is not in the model's layers.
    """
    if recipe.method != "peft":
        whole: PreTrainedModel = model.get_base_model()
        return whole
    if model.active_peft_config.is_prompt_learning:
        raise NotDeployable(
            f"method=peft, peft_type={recipe.peft['peft_type']}: a prompt that was learned is no part of the model's graph; use a kind of "
            "adapter that changes layers, such as IA3"
        )
    try:
        merged: PreTrainedModel = model.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError):  # of a kind that PEFT cannot add to weights
        return cast("PreTrainedModel", model.get_base_model())
    return merged


def calibration_rows(file: Path) -> list[dict[str, list[int]]]:
    """Training rows, evenly from all parts of the data, as the graph takes them."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=["input_ids", "token_type_ids"])
    step = max(len(table) // CALIBRATION_ROWS, 1)
    rows = table.take(list(range(0, len(table), step))).to_pylist()
    return [{name: ids for name, ids in row.items() if ids} for row in rows]
