"""Adds a recipe's tokens to its model: to the tokenizer, and as rows of the embedding and the head, which are then trained.

The model is prepared once and kept in the cache; after that it is an ordinary model folder. PEFT trains the rows through
trainable_token_indices. Its modules_to_save would hold whole matrices with gradients and optimizer states (16 bytes for each weight of the
embedding and the head). vLLM loads an adapter with neither.
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
LEGACY = (
    "added_tokens.json",
    "special_tokens_map.json",
)  # older files whose content is now in tokenizer.json and tokenizer_config.json
# How templates write text that is meant to be one token.
MARKER = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<[a-z]+(?:_[a-z]+)+>|</?s>")
PADDED_TO = 128  # the largest multiple that vocabularies are padded to on purpose
ROWS_AT_ONCE = 8192  # converted to fp64 at a time
FORM = 2  # version of what `prepare` writes; a change invalidates the cached models
SEED = 0  # fixed: adding the same tokens to the same base gives the same model


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def bare_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, unchanged.

    Raises:
        ModelError: the folder has no tokenizer that can be loaded.
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
    """Make `tokens` special tokens of the tokenizer; return the ids of those that it did not have before."""
    had = tokenizer.get_vocab().keys()
    ordinary = [token for token in dict.fromkeys(tokens) if token not in template.special_ids(tokenizer)]
    if ordinary:
        tokenizer.add_special_tokens({"extra_special_tokens": ordinary}, replace_extra_special_tokens=False)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in ordinary if token not in had]


def markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The markers that the chat template writes around turns, each meant to be one token, in the order of the template."""
    if not tokenizer.chat_template:
        return []
    try:
        turns = (template.ASKED, template.ANSWERED)
        text = template.render(tokenizer, turns, answered=True) + template.render(tokenizer, turns[:1])
    except template.TemplateRefusal:
        return []
    return list(dict.fromkeys(MARKER.findall(text)))


def begin_as_texts_do(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the template write bos_token first if the tokenizer begins every text with it."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)


def check_markers(tokenizer: PreTrainedTokenizerBase, template_name: str, native: Sequence[str]) -> None:
    """Check that each marker of the chat template is one token.

    `native`: the markers of the model's original template, which the model was trained to write as they are.

    Raises:
        ModelError: a marker is not a token.
    """
    known = tokenizer.get_vocab().keys() | set(native)
    lacking = [marker for marker in markers(tokenizer) if marker not in known]
    if not lacking:
        return
    pieces = len(tokenizer(lacking[0], add_special_tokens=False)["input_ids"])
    raise ModelError(
        f"model.chat_template={template_name} writes {' and '.join(lacking)}, which this tokenizer does not have: {lacking[0]} would be read "
        f"as {pieces} ordinary tokens. Add them with --set 'model.add_tokens={json.dumps(lacking)}', so that their embeddings are trained, "
        "or set model.chat_template=plain, which needs no new tokens"
    )


# --- the weights ------------------------------------------------------------------------------------------------------


def names(model: PreTrainedModel) -> tuple[str, str]:
    """The module names of the embedding and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    name_of = {id(module): name for name, module in model.named_modules()}
    embedding, head = (name_of.get(id(module), "") for module in ends)
    return embedding, head


def trained_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> dict[str, list[int]] | None:
    """LoraConfig's trainable_token_indices: the rows of `tokens` in the embedding and in the head. PEFT trains tied rows as one."""
    if not tokens:
        return None
    ids = sorted({int(tokenizer.convert_tokens_to_ids(token)) for token in tokens})
    return dict.fromkeys(names(model), ids)


def show_head(model: PeftModel) -> None:
    """Give PEFT's wrapper of a head with trained rows a `bias` of None, which TRL's fused head reads: the wrapper only forwards `weight`."""
    model.get_base_model().get_output_embeddings().bias = None


def settle(model: PeftModel) -> None:
    """Merge trained rows into their matrices: the result is the same, without a copy of the matrix at each forward pass."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge()


def key(folder: Path, tokens: Sequence[str]) -> str:
    """Hash of a model folder and the tokens that are added to it; the cache key."""
    files = (file for file in sorted(folder.rglob("*")) if is_companion(file))
    hashes = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    return hashlib.sha256(json.dumps([FORM, fingerprint(folder), hashes, list(tokens)]).encode()).hexdigest()


@dataclass(frozen=True)
class Growth:
    """How embedding and head grow.

    `matrices`: names of the tensors that change. `rows`: their new number of rows. `drawn`: indices of the rows that are initialized at random.
    `known`: how many rows the tokenizer had a token for.
    """

    matrices: frozenset[str]
    rows: int
    drawn: tuple[int, ...]
    known: int


def prepare(folder: Path, tokens: Sequence[str], trust_remote_code: bool, out: Path) -> None:
    """Write the model in `folder` with `tokens` to `out`. Unchanged shards are linked where possible and then take no disk space.

    Raises:
        ModelError: the weights lack an embedding or a head that can grow.
        DoesNotFit: the disk has too little free space.
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
    """Decide which rows are added: spare rows beyond the tokenizer's last token come first, and a padded vocabulary stays padded.

    `wanted`: number of ids that the tokenizer has now. `known`: number before the tokens were added; it may exceed the model's rows.
    """
    matrices = _matrices(folder, trust_remote_code)
    held = next(iter(matrices.values()))
    multiple = gcd(held, PADDED_TO) if held > known else 1
    rows = max(held, ceil(wanted / multiple) * multiple)
    drawn = {*range(min(known, held), wanted), *range(held, rows)}
    return Growth(frozenset(matrices), rows, tuple(sorted(drawn)), min(known, held))


def _matrices(folder: Path, trust_remote_code: bool) -> dict[str, int]:
    """The tensor names of embedding and head, with their numbers of rows; a tied head may be missing."""
    specs = {name: spec for shard in shards(folder) for name, spec in tensor_specs(shard).items()}
    model = skeleton(folder, trust_remote_code)
    embedding, head = (f"{name}.weight" for name in names(model))
    rows = {name: int(specs[name]["shape"][0]) for name in (embedding, head) if name in specs}
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if embedding not in rows or (head not in rows and not tied) or len(set(rows.values())) > 1:
        raise ModelError(
            f"{folder}: model.add_tokens requires {embedding} and {head} with the same number of rows in the weights, found {rows}"
        )
    if (bias := head.removesuffix("weight") + "bias") in specs:
        raise ModelError(
            f"{folder}: model.add_tokens does not support a head with a bias ({bias}): PEFT does not train the bias of new rows"
        )
    return rows


def skeleton(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model of a folder on the meta device, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    config.get_text_config().pad_token_id = None  # transformers refuses an id beyond the embedding
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _rewrite(folder: Path, shard: Path, target: Path, growth: Growth) -> None:
    """Write a shard to `target` with its embedding or head grown, one tensor at a time."""
    specs = tensor_specs(shard)
    sizes = {name: _grown_spec(spec, growth.rows) if name in growth.matrices else spec for name, spec in specs.items()}
    file = TensorFile(target, sizes)
    for name, tensor in read(folder, list(specs)):
        file.write(name, _grown(tensor, growth) if name in growth.matrices else tensor)
    file.close()


def _grown_spec(spec: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {"dtype": spec["dtype"], "shape": [rows, *spec["shape"][1:]]}


def _grown(matrix: torch.Tensor, growth: Growth) -> torch.Tensor:
    """`matrix` [rows, width] with more rows: [growth.rows, width]. The new rows are drawn from a normal distribution fitted to the known ones.

    Spare rows are drawn again as well: no token has used them, and some models leave them at zero, where a norm has no useful gradient.
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
    """Update the vocabulary size in config.json and the total size in the index."""
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
