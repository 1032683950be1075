"""Vocabulary, tied heads and config.json of a merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.merging.layout import Layout
from qkit.model import added_tokens, older_forms
from qkit.tensors.lora_deltas import Deltas
from qkit.tensors.shard_writer import model_specs
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class OutputShape:
    """How the merged model differs in shape from the base: a separate head (`untied`), and `vocabulary`: its rows if they changed."""

    untied: bool
    vocabulary: int | None


def untied_head(folder: Path, specs: Mapping[str, Spec], deltas: Deltas, layout: Layout) -> tuple[str, str]:
    """(head, embedding) if the base has one matrix for both and the adapter changes only one of them; else ("", "").

    PEFT keeps deltas and whole matrices of a tied pair separate: merged into one matrix they would change the other side too.
    """
    if not _says_tied(folder, json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        return "", ""
    embedding, head = (f"{name}.weight" for name in added_tokens.names(_skeleton(layout)))
    if not (deltas.changes(embedding) or deltas.changes(head)):
        return "", ""
    on_disk = layout.on_disk(embedding), layout.on_disk(head)
    if all(name in specs for name in on_disk) and _differ(folder, on_disk):
        return "", ""  # two matrices already, whatever the config says: transformers loads them as they are
    replaced = [shape for shape in (deltas.shape(embedding), deltas.shape(head)) if shape]
    rows = int(specs[on_disk[0]]["shape"][0])
    if any(shape[0] != rows for shape in replaced) and len(replaced) == 1:
        return "", ""  # resized and still tied: the one matrix that the adapter holds serves as both
    return on_disk[1], on_disk[0]


def _skeleton(layout: Layout) -> PreTrainedModel:
    """The model without weights. Raises what its remote code raises, if it has any."""
    return layout.model or added_tokens.skeleton(layout.folder, False)


def _says_tied(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a config.json ties embedding and head, explicitly or by default."""
    text_config = {**config, **(config.get("text_config") or {})}
    return bool(text_config.get("tie_word_embeddings", _tied_by_default(folder)))


def _tied_by_default(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(str(folder)).get_text_config().tie_word_embeddings)
    except (OSError, ValueError):
        return False  # models with remote code say so in their config


def vocabulary_of(before: Mapping[str, Spec], after: Mapping[str, Spec]) -> int | None:
    """Rows of embedding and head if the adapter holds resized ones, else None.

    Raises:
        ModelError: it holds only one of them resized, or both with different sizes.
    """
    resized = {n: int(after[n]["shape"][0]) for n in before if list(after[n]["shape"]) != list(before[n]["shape"])}
    if not resized:
        return None
    old = {int(before[name]["shape"][0]) for name in resized}
    unchanged = [
        n for n in before if n not in resized and len(before[n]["shape"]) == 2 and _is_vocabulary(n, before[n], old)
    ]
    if unchanged or len(set(resized.values())) > 1:
        sizes = ", ".join(f"{name} with {rows} rows" for name, rows in resized.items())
        rest = f", and {unchanged[0]} is unchanged" if unchanged else ""
        raise ModelError(
            f"the adapter holds {sizes}, but the base has {min(old)}{rest}: embedding and head must be resized to the same size"
        )
    return next(iter(resized.values()))


def _is_vocabulary(name: str, spec: Spec, rows: set[int]) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return module in {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"} and int(spec["shape"][0]) in rows


def kept_dtype(original: str, target: str) -> str:
    """The safetensors dtype to write: floating-point tensors take the recipe's dtype, others keep theirs."""
    return SAFETENSORS_NAMES[target] if original in SAFETENSORS_NAMES.values() else original


def write_config(folder: Path, out: Path, dtype: str, output: OutputShape) -> None:
    """Write the base's config.json with the new dtype and vocabulary, and without quantization.

    Whether embedding and head are tied is read from the weights that were written, whatever the base's config says.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config = older_forms.in_dtype(config, dtype)
    sections = [section for section in (config, config.get("text_config")) if isinstance(section, dict)]
    for section in sections:
        if output.vocabulary is not None and "vocab_size" in section:
            section["vocab_size"] = output.vocabulary
    if (tied := _is_tied(folder, out, config)) is not None:
        for section in sections:
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = tied
    (out / "config.json").write_text(
        json.dumps(older_forms.config(config), indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _is_tied(folder: Path, out: Path, config: Mapping[str, Any]) -> bool | None:
    """Whether the weights in `out` hold one matrix for embedding and head; None if the two cannot be identified."""
    try:
        names = _ends_on_disk(folder)
    except (OSError, ValueError):
        return None  # a model with remote code
    specs = model_specs(out)
    present = [name for name in names if name in specs]
    if len(present) == 2:
        return _says_tied(folder, config) and not _differ(out, names)
    alike = [name for name in specs if present and list(specs[name]["shape"]) == list(specs[present[0]]["shape"])]
    return True if len(alike) == 1 else None  # another matrix of this shape may be the other end, under another name


def _ends_on_disk(folder: Path) -> tuple[str, str]:
    """The checkpoint's names of the weights of embedding and head."""
    layout = Layout(folder, dict(model_specs(folder)))
    embedding, head = (layout.on_disk(f"{name}.weight") for name in added_tokens.names(_skeleton(layout)))
    return embedding, head


def _differ(folder: Path, names: Sequence[str]) -> bool:
    """Whether two matrices of a folder hold different values; both are read whole."""
    (_, one), (_, other) = read(folder, list(names))
    return not one.equal(other)
