"""Rounds a model whose weights were trained themselves: it becomes the same folder as a merge, and nothing is merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.core.progress import Progress
from qkit.merging.sizes import OutputShape, write_config
from qkit.merging.weights import TensorMerge, write_tensors
from qkit.recipe import schema
from qkit.tensors.lora_deltas import Deltas


def write_rounded(
    folder: Path, trained: Path, out: Path, section: schema.Merge, note: Mapping[str, Any], progress: Progress
) -> None:
    """Write the weights of `trained` in the first dtype that `section` lists, and config.json, to `out`.

    `folder`: the base model that training began with, whose config.json it is. `note`: the qkit.json of `trained`.

    Raises:
        ModelError: the result holds NaN or infinity.
    """
    write_tensors(trained, TensorMerge(trained, Deltas(None), "16bit", note), out, section, progress)
    write_config(folder, out, section.dtypes[0], OutputShape(untied=False, vocabulary=None))
