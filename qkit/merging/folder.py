"""A run's merged model as a folder that loads anywhere: weights, config, tokenizer, template, stop tokens, and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qkit.core.files import make_folder, read_json
from qkit.merging.weights import merge
from qkit.model import older_forms, provenance, source
from qkit.model import tokenizer as model_tokenizer
from qkit.recipe.schema import Base, Dtype
from qkit.run.directory import Run
from qkit.tensors.companions import copy_companions


def write_folder(
    run: Run, out: Path, base: Base, adapters: Mapping[str, float] | None = None, dtype: Dtype | None = None
) -> None:
    """Merge the run's adapter onto its base's weights, as `base` says, into the new folder `out`.

    `adapters`: hashes and weights of those that it was combined from. `dtype`: of the weights; default: the first that the recipe would try.

    Raises:
        ModelError: the adapter does not belong to this base, is in it already, or is of a kind that is not merged.
    """
    make_folder(out)
    folder, adapter = source.resolve(run.recipe.model), run.need("train", "adapter")
    note = provenance.check_adapter(adapter, folder)
    copy_companions(folder, out)
    section = run.recipe.merge.model_copy(update={"dtype": dtype or run.recipe.merge.dtypes[0]})
    merge(folder, adapter, out, base, section, note, run.progress)  # with a config.json of its own
    _write_tokenizer(run, out, ours=adapters is None)
    older_forms.settle(out, source.companions(run.recipe.model))
    if (tokens := run.folder("data") / "tokens.json").is_file():
        add_stop_tokens(out, json.loads(tokens.read_text(encoding="utf-8"))["stop"])
    merged = adapters or {provenance.adapter_sha256(adapter): 1.0}
    provenance.write_merged(out, folder, run.recipe.model.source, base, merged)


def _write_tokenizer(run: Run, out: Path, ours: bool) -> None:
    """The tokenizer as training had it, where that is not what the base's files say: with a template or tokens of the recipe's; or because
    transformers 5 puts rules of its own in the place of those in the file, by the name of the class. `ours`: the adapter is the run's own."""
    section = run.recipe.model
    if not (section.chat_template or section.add_tokens or ours):
        return
    tokenizer = model_tokenizer.tokenizer_of(section)
    if section.chat_template:
        older_forms.drop_templates(out)  # the base's, of which one for tools would be taken before this one
    if section.chat_template or section.add_tokens:
        tokenizer.save_pretrained(str(out))
    elif not older_forms.cuts_alike(tokenizer, out):
        tokenizer.backend_tokenizer.save(str(out / older_forms.CUTS))


def dtype_of(run: Run) -> Dtype:
    """Of the run's merged weights: what the recipe says, or where that leaves it to measuring what they have become."""
    made, section = run.folder("merge") / "config.json", run.recipe.merge
    found: Dtype = section.dtypes[0] if len(section.dtypes) == 1 or not made.is_file() else read_json(made)["dtype"]
    return found


def add_stop_tokens(out: Path, trained: Sequence[int]) -> None:
    """See that whoever loads the folder stops where training ended its turns, and where the base stopped: in generation_config.json and in
    config.json, as each is read by some. The trained ones come first: of several, some readers take one."""
    files = [out / "generation_config.json", out / "config.json"]
    configs = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files]
    rows = {**configs[1], **(configs[1].get("text_config") or {})}.get("vocab_size")
    known = [token for config in configs for token in _as_list(config.get("eos_token_id"))]
    said = [
        token for token in known if rows is None or token < rows
    ]  # a default of the library may be none of this vocabulary
    stop = list(dict.fromkeys([*trained, *said]))
    for file, config in zip(files, configs, strict=True):
        if config or file is files[0]:
            config["eos_token_id"] = stop[0] if len(stop) == 1 else stop
            file.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _as_list(found: int | Sequence[int] | None) -> list[int]:
    return [] if found is None else [found] if isinstance(found, int) else list(found)
