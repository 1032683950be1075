"""A run's merged model as a folder that loads anywhere: weights, config, tokenizer, template, stop tokens, and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qkit import model, provenance
from qkit.merging import Base, merge
from qkit.recipe import Dtype
from qkit.run import Run, make_folder, read_json
from qkit.tensor_files import copy_companions


def write_folder(
    run: Run, out: Path, base: Base, adapters: Mapping[str, float] | None = None, dtype: Dtype | None = None
) -> None:
    """Merge the run's adapter onto its base's weights, as `base` says, into the new folder `out`.

    `adapters`: hashes and weights of those that it was combined from. `dtype`: of the weights; default: the first that the recipe would try.

    Raises:
        ModelError: the adapter does not belong to this base, is in it already, or is of a kind that is not merged.
    """
    make_folder(out)
    folder, adapter = model.resolve(run.recipe.model), run.need("train", "adapter")
    note = provenance.check_adapter(adapter, folder)
    copy_companions(folder, out)
    section = run.recipe.merge.model_copy(update={"dtype": dtype or run.recipe.merge.dtypes[0]})
    merge(folder, adapter, out, base, section, note, run.progress)  # with a config.json of its own
    if run.recipe.model.chat_template or run.recipe.model.add_tokens:
        model.tokenizer_of(run.recipe.model).save_pretrained(str(out))
    if (tokens := run.folder("data") / "tokens.json").is_file():
        _write_stop_tokens(out, json.loads(tokens.read_text(encoding="utf-8"))["stop"])
    merged = adapters or {provenance.adapter_sha256(adapter): 1.0}
    provenance.write_merged(out, folder, run.recipe.model.source, base, merged)


def dtype_of(run: Run) -> Dtype:
    """Of the run's merged weights: what the recipe says, or where that leaves it to measuring what they have become."""
    made, section = run.folder("merge") / "config.json", run.recipe.merge
    found: Dtype = section.dtypes[0] if len(section.dtypes) == 1 or not made.is_file() else read_json(made)["dtype"]
    return found


def add_stop_token(out: Path, token: int) -> None:
    """See that the generation config stops at this one too; it comes first, as the one that ends a turn."""
    file = out / "generation_config.json"
    known = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.exists() else None
    others = known if isinstance(known, list) else [] if known is None else [known]
    _write_stop_tokens(out, [token, *(other for other in others if other != token)])


def _write_stop_tokens(out: Path, stop: list[int]) -> None:
    """The generation config must stop where training ended its turns, or a runtime talks on."""
    file = out / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    config["eos_token_id"] = stop[0] if len(stop) == 1 else stop
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
