"""Writes a run's merged model as a folder that loads anywhere: weights, config, tokenizer, template, stop tokens and provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.core.files import make_folder, read_json
from qkit.merging import any_peft, loaded, whole
from qkit.merging.weights import merge
from qkit.model import older_forms, provenance, source
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.task import open_task
from qkit.recipe.schema import WHOLE, Base
from qkit.recipe.section import Dtype
from qkit.run.directory import Run
from qkit.tensors.companions import copy_companions


def write_folder(
    run: Run, out: Path, base: Base, adapters: Mapping[str, float] | None = None, dtype: Dtype | None = None
) -> None:
    """Merge the run's adapter into its base's weights, as `base` says, and write the new folder `out`; where all weights were trained, these.

    `adapters`: hashes and weights of the adapters that the run's was combined from. `dtype`: of the weights; None: the recipe's first dtype.

    Raises:
        ModelError: the adapter does not belong to this base, is already merged into it, or is of a kind that cannot be merged; or the base's
            eos_token_id is not a token id.
    """
    if not open_task(run.recipe.task).HEAD.generates:
        loaded.write_folder(run, out, base, dtype or run.recipe.merge.dtypes[0])
        return
    folder, adapter = source.resolve(run.recipe.model), run.trained()
    note = provenance.check_adapter(adapter, folder)
    base_stop_tokens(folder)
    make_folder(out)
    copy_companions(folder, out)
    section = run.recipe.merge.model_copy(update={"dtype": dtype or run.recipe.merge.dtypes[0]})
    if run.recipe.method in WHOLE:
        whole.write_rounded(folder, adapter, out, section, note, run.progress)
    elif run.recipe.method == "peft":
        any_peft.write_merged(folder, adapter, out, base, run.recipe, section)
    else:
        merge(folder, adapter, out, base, section, note, run.progress)  # writes a config.json of its own
    _write_tokenizer(run, out, trained_here=adapters is None)
    older_forms.settle(out, source.companions(run.recipe.model))
    if (tokens := run.folder("data") / "tokens.json").is_file():
        add_stop_tokens(out, json.loads(tokens.read_text(encoding="utf-8"))["stop"])
    merged = adapters or {provenance.adapter_sha256(adapter): 1.0}
    provenance.write_merged(out, folder, run.recipe.model.source, base, merged)


def _write_tokenizer(run: Run, out: Path, trained_here: bool) -> None:
    """Write the tokenizer as training used it, if it differs from the base's files.

    It differs if the recipe sets a template or adds tokens, or if transformers 5 replaces the rules in tokenizer.json by those of the
    tokenizer's class. `trained_here`: the adapter is the run's own.
    """
    section = run.recipe.model
    if not (section.chat_template or section.add_tokens or trained_here):
        return
    tokenizer = model_tokenizer.tokenizer_of(section)
    if section.chat_template:
        older_forms.drop_templates(out)  # one of the base's for tools would take precedence
    if section.chat_template or section.add_tokens:
        tokenizer.save_pretrained(str(out))
    elif not older_forms.cuts_alike(tokenizer, out):
        tokenizer.backend_tokenizer.save(str(out / older_forms.CUTS))


def dtype_of(run: Run) -> Dtype:
    """The dtype of the run's merged weights: the recipe's, or if that is measured, the one that was chosen."""
    file, section = run.folder("merge") / "config.json", run.recipe.merge
    dtype: Dtype = section.dtypes[0] if len(section.dtypes) == 1 or not file.is_file() else read_json(file)["dtype"]
    return dtype


# --- stop tokens ------------------------------------------------------------------------------------------------------

STOP_FILES = ("generation_config.json", "config.json")  # some readers use one, some the other


def base_stop_tokens(folder: Path) -> list[int]:
    """The token ids at which a model stops, by both of its files. Ids outside the vocabulary, which library defaults can be, are left out.

    Raises:
        ModelError: an eos_token_id is not a token id or a list of them.
    """
    configs = {name: _read_config(folder / name) for name in STOP_FILES}
    config = configs["config.json"]
    rows = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    tokens = [
        token
        for name in STOP_FILES
        for token in model_tokenizer.token_ids(configs[name], "eos_token_id", folder / name)
    ]
    return [token for token in tokens if token >= 0 and (rows is None or token < rows)]


def add_stop_tokens(out: Path, trained: Sequence[int]) -> None:
    """Make the model in `out` stop where training ended its turns, and where the base stopped.

    The trained tokens come first, because some readers use only one.

    Raises:
        ModelError: an eos_token_id is not a token id or a list of them.
    """
    stop = list(dict.fromkeys([*trained, *base_stop_tokens(out)]))
    for name in STOP_FILES:
        config = _read_config(out / name)
        if config or name == STOP_FILES[0]:
            config["eos_token_id"] = stop[0] if len(stop) == 1 else stop
            (out / name).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def _read_config(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config
