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
class Written:
    """What the merged weights have that the base's have not: a head of its own, another vocabulary."""

    untied: bool
    vocabulary: int | None


def head_of_its_own(folder: Path, found: Mapping[str, Spec], deltas: Deltas, layout: Layout) -> tuple[str, str]:
    """(head, embedding) where the base has one matrix for both and the adapter changes one of them alone; else ("", "").

    Deltas and whole matrices of a tied pair are PEFT's own on each side: merged into one matrix they would change the other side too.
    """
    if not _says_tied(folder, json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        return "", ""
    embedding, head = (f"{name}.weight" for name in added_tokens.names(_needed(layout)))
    if not (deltas.changes(embedding) or deltas.changes(head)):
        return "", ""
    ends = layout.on_disk(embedding), layout.on_disk(head)
    if all(end in found for end in ends) and _differ(folder, ends):
        return "", ""  # two already, whatever the config says: transformers loads them as they are
    sizes = [shape for shape in (deltas.shape(embedding), deltas.shape(head)) if shape]
    held = layout.on_disk(embedding)
    rows = int(found[held]["shape"][0])
    if any(shape[0] != rows for shape in sizes) and len(sizes) == 1:
        return "", ""  # resized, and tied still: the one matrix that the adapter holds is both
    return layout.on_disk(head), held


def _needed(layout: Layout) -> PreTrainedModel:
    """The model without weights; of remote code it raises what that raises."""
    return layout.model or added_tokens.skeleton(layout.folder, False)


def _says_tied(folder: Path, config: Mapping[str, Any]) -> bool:
    """What a config.json says, or means by saying nothing."""
    said = {**config, **(config.get("text_config") or {})}
    return bool(said.get("tie_word_embeddings", _tied_by_default(folder)))


def _tied_by_default(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(str(folder)).get_text_config().tie_word_embeddings)
    except (OSError, ValueError):
        return False  # a model of remote code says so in its config


def vocabulary_of(before: Mapping[str, Spec], after: Mapping[str, Spec]) -> int | None:
    """Rows of embedding and head where the adapter holds resized ones.

    Raises:
        ModelError: it holds one resized, and the other one is as it was.
    """
    grown = {n: int(after[n]["shape"][0]) for n in before if list(after[n]["shape"]) != list(before[n]["shape"])}
    if not grown:
        return None
    old = {int(before[name]["shape"][0]) for name in grown}
    left = [n for n in before if n not in grown and len(before[n]["shape"]) == 2 and _is_vocabulary(n, before[n], old)]
    if left or len(set(grown.values())) > 1:
        raise ModelError(
            f"the adapter holds {', '.join(f'{n} with {rows} rows' for n, rows in grown.items())} where the base has {min(old)}"
            + (f", and {left[0]} is as it was" if left else "")
            + ": only embeddings and heads that were resized alike are merged"
        )
    return next(iter(grown.values()))


def _is_vocabulary(name: str, spec: Spec, rows: set[int]) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return module in {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"} and int(spec["shape"][0]) in rows


def kept_dtype(found: str, wanted: str) -> str:
    """Floating-point tensors are rounded to the recipe's dtype; others stay what they are."""
    return SAFETENSORS_NAMES[wanted] if found in SAFETENSORS_NAMES.values() else found


def write_config(folder: Path, out: Path, dtype: str, written: Written) -> None:
    """The base's config, with the dtype that the weights have now, no quantization, and what of their shape is new; whether one matrix is
    embedding and head is read off the weights that were written, whatever the base's config said."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config = older_forms.in_dtype(config, dtype)
    sections = [section for section in (config, config.get("text_config")) if isinstance(section, dict)]
    for section in sections:
        if written.vocabulary is not None and "vocab_size" in section:
            section["vocab_size"] = written.vocabulary
    if (tied := _is_tied(folder, out, config)) is not None:
        for section in sections:
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = tied
    (out / "config.json").write_text(
        json.dumps(older_forms.config(config), indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _is_tied(folder: Path, out: Path, config: Mapping[str, Any]) -> bool | None:
    """Whether the weights in `out` hold one matrix for embedding and head; None where they cannot be told from the others."""
    try:
        names = _ends(folder)
    except (OSError, ValueError):
        return None  # a model of remote code
    specs = model_specs(out)
    held = [name for name in names if name in specs]
    if len(held) == 2:
        return _says_tied(folder, config) and not _differ(out, names)
    alike = [name for name in specs if held and list(specs[name]["shape"]) == list(specs[held[0]]["shape"])]
    return True if len(alike) == 1 else None  # another one of that shape may be the other end, under another name


def _ends(folder: Path) -> tuple[str, str]:
    """The weights that are embedding and head, as they are called on disk."""
    layout = Layout(folder, dict(model_specs(folder)))
    embedding, head = (layout.on_disk(f"{name}.weight") for name in added_tokens.names(_needed(layout)))
    return embedding, head


def _differ(folder: Path, names: Sequence[str]) -> bool:
    """Whether two matrices of a folder hold other values; they are read whole."""
    (_, one), (_, other) = read(folder, list(names))
    return not one.equal(other)
