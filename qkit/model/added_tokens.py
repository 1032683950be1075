"""Tokens that a recipe adds to its model: the tokenizer gets them, embedding and head get rows for them, and these rows are learnt.

The model is prepared once and kept in the cache; from there on it is an ordinary model folder. The rows are learnt by peft's
trainable_token_indices: its modules_to_save would hold whole matrices with their gradients and optimizer states (16 bytes for each weight of
embedding and head), and vLLM takes an adapter with neither.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.chat import template
from qkit.core.errors import ModelError
from qkit.core.files import link_or_copy, need_disk, sha256_of
from qkit.model import older_forms
from qkit.tensors.companions import copy_companions, is_companion
from qkit.tensors.shards import TensorFile, fingerprint, read, shards, tensor_specs

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INDEX = "model.safetensors.index.json"
LEGACY = ("added_tokens.json", "special_tokens_map.json")  # older forms of what tokenizer.json and its config say now
# How templates write what is meant to be one token.
MARKER = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<[a-z]+(?:_[a-z]+)+>|</?s>")
PADDED_TO = 128  # the largest multiple that a vocabulary is known to be padded to on purpose
ROWS_AT_ONCE = 8192  # are held in fp64 at a time
FORM = 2  # of what `prepare` writes: another number makes it anew where it is kept
SEED = 0  # the same tokens on the same base are the same model


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def bare_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder as it is.

    Raises:
        ModelError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    return loaded


def add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Make special tokens of `tokens`; returns the ids of those that the tokenizer had not at all."""
    had = tokenizer.get_vocab().keys()
    ordinary = [token for token in dict.fromkeys(tokens) if token not in template.special_ids(tokenizer)]
    if ordinary:
        tokenizer.add_special_tokens({"extra_special_tokens": ordinary}, replace_extra_special_tokens=False)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in ordinary if token not in had]


def markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the chat template writes around turns that is meant to be one token, in its order."""
    if not tokenizer.chat_template:
        return []
    try:
        turns = (template.ASKED, template.ANSWERED)
        text = template.render(tokenizer, turns, answered=True) + template.render(tokenizer, turns[:1])
    except template.TemplateRefusal:
        return []
    return list(dict.fromkeys(MARKER.findall(text)))


def begin_as_texts_do(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the template write bos_token first where the tokenizer begins every text with it."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)


def check_markers(tokenizer: PreTrainedTokenizerBase, named: str, own: Sequence[str]) -> None:
    """See that the template's markers are tokens. `own`: those of the model's own template, which it knows as it writes them.

    Raises:
        ModelError: some are not.
    """
    known = tokenizer.get_vocab().keys() | set(own)
    lacking = [marker for marker in markers(tokenizer) if marker not in known]
    if not lacking:
        return
    pieces = len(tokenizer(lacking[0], add_special_tokens=False)["input_ids"])
    raise ModelError(
        f"model.chat_template={named} writes {' and '.join(lacking)}, which this tokenizer does not have: {lacking[0]} would be read as "
        f"{pieces} ordinary tokens. Add them with --set 'model.add_tokens={json.dumps(lacking)}', so that their embeddings are learnt, "
        "or take model.chat_template=plain, which needs no new tokens"
    )


# --- the weights ------------------------------------------------------------------------------------------------------


def names(model: PreTrainedModel) -> tuple[str, str]:
    """The modules that are the embedding and the head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(module): name for name, module in model.named_modules()}
    embedding, head = (found.get(id(module), "") for module in wanted)
    return embedding, head


def learnt_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> dict[str, list[int]] | None:
    """LoraConfig's trainable_token_indices: the rows of `tokens`, in the embedding and in the head. Tied ones peft learns as one."""
    if not tokens:
        return None
    ids = sorted({int(tokenizer.convert_tokens_to_ids(token)) for token in tokens})
    return dict.fromkeys(names(model), ids)


def show_head(model: PeftModel) -> None:
    """Let TRL's fused head read the bias of a head whose rows are learnt: peft's wrapper hands on its weight alone, and there is no bias."""
    model.get_base_model().get_output_embeddings().bias = None


def settle(model: PeftModel) -> None:
    """Put learnt rows into their matrices for good: the same numbers that every forward would copy the matrix for."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge()


def key(folder: Path, tokens: Sequence[str]) -> str:
    """Hash of a model and the tokens that are added to it."""
    files = (file for file in sorted(folder.rglob("*")) if is_companion(file))
    hashes = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    return hashlib.sha256(json.dumps([FORM, fingerprint(folder), hashes, list(tokens)]).encode()).hexdigest()


@dataclass(frozen=True)
class Growth:
    """The matrices that change, how many rows they get, which of these are drawn, and how many the tokenizer had a token for."""

    matrices: frozenset[str]
    rows: int
    drawn: tuple[int, ...]
    known: int


def prepare(folder: Path, tokens: Sequence[str], trust_remote_code: bool, out: Path) -> None:
    """Write the model in `folder` with `tokens` to `out`. Shards that stay as they are cost no disk.

    Raises:
        ModelError: embedding or head are not found in the weights, or are not of the plain kind.
        DoesNotFit: the disk is full.
    """
    tokenizer = bare_tokenizer(folder, trust_remote_code)
    known = 1 + max(tokenizer.get_vocab().values())
    add(tokenizer, tokens)
    growth = _growth(folder, trust_remote_code, 1 + max(tokenizer.get_vocab().values()), known)
    changed = (
        [shard for shard in shards(folder) if growth.matrices & tensor_specs(shard).keys()] if growth.drawn else []
    )
    out.mkdir(parents=True)
    need_disk(out, sum(shard.stat().st_size for shard in changed), "model.add_tokens")
    copy_companions(folder, out, but=LEGACY)
    for file in folder.iterdir():
        if file.suffix == ".safetensors" and file not in changed:
            link_or_copy(file, out / file.name, "model.add_tokens")
        elif file.name == INDEX:
            shutil.copyfile(file, out / file.name)
    for shard in changed:
        _rewrite(folder, shard, out / shard.name, growth)
    tokenizer.save_pretrained(str(out))
    older_forms.settle(out, folder)
    _write_sizes(out, growth.rows)


def _growth(folder: Path, trust_remote_code: bool, wanted: int, known: int) -> Growth:
    """Spare rows beyond the tokenizer's last token are used first. A vocabulary that is padded to a multiple stays one of it.

    `known`: ids that the tokenizer had; it may have more than the model has rows. `wanted`: those that it has now.
    """
    matrices = _matrices(folder, trust_remote_code)
    held = next(iter(matrices.values()))
    multiple = gcd(held, PADDED_TO) if held > known else 1
    rows = max(held, ceil(wanted / multiple) * multiple)
    drawn = {*range(min(known, held), wanted), *range(held, rows)}
    return Growth(frozenset(matrices), rows, tuple(sorted(drawn)), min(known, held))


def _matrices(folder: Path, trust_remote_code: bool) -> dict[str, int]:
    """Embedding and head as the weights name them, with their rows; a tied head may be missing."""
    specs = {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}
    made = skeleton(folder, trust_remote_code)
    embedding, head = (f"{name}.weight" for name in names(made))
    found = {name: int(specs[name]["shape"][0]) for name in (embedding, head) if name in specs}
    tied = bool(made.config.get_text_config().tie_word_embeddings)
    if embedding not in found or (head not in found and not tied) or len(set(found.values())) > 1:
        raise ModelError(
            f"{folder}: model.add_tokens needs {embedding} and {head} of the same length in the weights, found {found}"
        )
    if (bias := head.removesuffix("weight") + "bias") in specs:
        raise ModelError(
            f"{folder}: model.add_tokens cannot be used, its head has a bias ({bias}), which peft leaves out of learnt rows"
        )
    return found


def skeleton(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    config.get_text_config().pad_token_id = None  # one that the embedding has no row for would be refused
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return made


def _rewrite(folder: Path, shard: Path, target: Path, growth: Growth) -> None:
    """A shard with its embedding or head grown, one tensor at a time."""
    specs = tensor_specs(shard)
    sizes = {name: _grown_spec(spec, growth.rows) if name in growth.matrices else spec for name, spec in specs.items()}
    file = TensorFile(target, sizes)
    for name, tensor in read(folder, list(specs)):
        file.write(name, _grown(tensor, growth) if name in growth.matrices else tensor)
    file.close()


def _grown_spec(spec: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {"dtype": spec["dtype"], "shape": [rows, *spec["shape"][1:]]}


def _grown(matrix: torch.Tensor, growth: Growth) -> torch.Tensor:
    """`matrix` [rows, width] with more rows; those of the new tokens, and of the padding that is added, are drawn around the known ones.

    Spare rows are drawn as well: no token has ever used them, and some models leave them zero, where a norm has no useful gradient.
    """
    import torch

    mean, spread = _moments(matrix[: growth.known])
    noise = torch.randn(
        len(growth.drawn), matrix.shape[1], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
    )
    grown = matrix.new_empty(growth.rows, matrix.shape[1])
    grown[: len(matrix)] = matrix
    grown[list(growth.drawn)] = (mean + spread * noise).to(matrix.dtype)
    return grown


def _moments(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column, in fp64."""
    mean = sum(chunk.sum(0) for chunk in _chunks(matrix)) / len(matrix)
    variance = sum(((chunk - mean) ** 2).sum(0) for chunk in _chunks(matrix)) / len(matrix)
    return mean, variance**0.5


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for chunk in matrix.split(ROWS_AT_ONCE):
        yield chunk.double()


def _write_sizes(out: Path, rows: int) -> None:
    """What config and index say of the weights."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for section in (config, config.get("text_config", {})):
        if "vocab_size" in section:
            section["vocab_size"] = rows
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if (out / INDEX).exists():
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        specs = [spec for shard in shards(out) for spec in tensor_specs(shard).values()]
        index["metadata"] = {"total_size": sum(spec["data_offsets"][1] - spec["data_offsets"][0] for spec in specs)}
        (out / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
