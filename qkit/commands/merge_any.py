"""`qkit merge --base B --adapter A --out D`: adapters and bases from anywhere, one or several, measured on somebody's own rows.

What a run would hold is made in a folder beside `D` (the adapter, or all of them; the rows, tokenized), so that the merge and its
measurement are those of the stage. Whatever way several are combined in, they are measured against all of them active at once, each with
its weight (several.py): never against what combining made of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.commands.combine import PEFTS, SUM, combination_note, combined_adapter
from qkit.core.device import detect
from qkit.core.errors import DataError, MissingArtifact, ModelError, RecipeError
from qkit.core.files import make_folder, need_disk, read_json, write_json
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.data import summary as data_summary
from qkit.measure import candidates, held_out, parity
from qkit.measure import reference as measure_reference
from qkit.measure.candidates import Candidate
from qkit.merge.stage import with_finer
from qkit.merging.folder import add_stop_tokens, write_folder
from qkit.model import adapter_sum, added_tokens, older_forms, provenance
from qkit.model import source as model_source
from qkit.plugins.runtime import open_runtime
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.tensors.lora_deltas import Deltas
from qkit.tensors.shards import copy_companions, shards

if TYPE_CHECKING:
    from qkit.commands.combine import Wish


LOST = (
    "Measured on the rows given with --data; are they of the kind that it was trained on? Else serve the adapter apart"
)
VOCABULARY = ("vocab*", "merges.txt", "*.tiktoken", "spiece.model")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", *VOCABULARY)
SAMPLE = "Steps:\n\n1. Do it\u0301 by 2025-01-02, \u3053\u3093\u306b\u3061\u306f 🙂\n\treturn x['a']  # 1234567"


def merge(wish: Wish, progress: Progress) -> dict[str, Any]:
    """Merge, measure where there are rows, and put the folder in its place when it is whole; what was done and could not be checked.

    Raises:
        ModelError, MissingArtifact: the adapter, or the base, cannot be merged, or the one is known not to belong to the other.
        RecipeError, DataError: the wish is not clear, or no row can be used. ParityFailed: the fine-tune is not in the merged model.
    """
    weights, combined = _weights(wish), _is_combined(wish)
    if wish.out.exists() and (not wish.out.is_dir() or any(wish.out.iterdir())):
        raise MissingArtifact(f"{wish.out}: is there already and is not empty; give --out a new folder")
    make_folder(wish.out.parent)
    how = _recipe(wish)
    folder = model_source.resolve(how.model)
    notes = [note for adapter in wish.adapters for note in _checked(adapter, folder, wish.base)]
    notes += _trained_otherwise(wish, how)
    need_disk(wish.out.parent, 2 * sum(shard.stat().st_size for shard in shards(folder)), "merge")
    with tempfile.TemporaryDirectory(dir=wish.out.parent, prefix=f".{wish.out.name}-") as temporary:
        run = Run(Path(temporary), how, progress)
        alone = Run(run.root / "alone", how, progress) if combined else run  # whose adapters are as they were given
        _take_in(wish, weights, folder, alone.folder("train") / "adapter", how)
        if combined:
            notes += combined_adapter(wish, weights, folder, run, how)
        table = _made(run, alone, wish, _hashes(wish, weights))
        if wish.out.exists():
            wish.out.rmdir()
        candidates.folder_of(run.root, table["chosen"]).rename(wish.out)
    return {"out": str(wish.out), "notes": [*notes, *_read_otherwise(wish.out)], **table}


def _hashes(wish: Wish, weights: Sequence[float]) -> dict[str, float]:
    """What was merged, with its weight: the sum of them for an adapter that is named twice."""
    found: dict[str, float] = {}
    for adapter, weight in zip(wish.adapters, weights, strict=True):
        digest = provenance.adapter_sha256(adapter)
        found[digest] = found.get(digest, 0.0) + weight
    return found


def _read_otherwise(out: Path) -> list[str]:
    """Whether transformers 5, which measured here, cuts texts in another way than the tokenizer.json that all others read."""
    if not (out / older_forms.TOKENIZER).is_file():
        return []
    try:
        tokenizer = added_tokens.bare_tokenizer(out, trust_remote_code=False)
    except ModelError:
        return []  # one of remote code, which is the same program for all
    if older_forms.cuts_alike(tokenizer, out):
        return []
    return [
        f"transformers 5 cuts texts by rules that its {type(tokenizer).__name__} has for this kind of model, all other readers by those in "
        f"{older_forms.CUTS}, and they differ: prompts may become other tokens; compare them with what the adapter was trained on"
    ]


def _weights(wish: Wish) -> list[float]:
    if not wish.adapters:
        raise RecipeError("name at least one --adapter")
    if wish.weights and len(wish.weights) != len(wish.adapters):
        raise RecipeError(
            f"{len(wish.adapters)} times --adapter and {len(wish.weights)} times --weight: give one for each"
        )
    if odd := [weight for weight in wish.weights if not isfinite(weight)]:
        raise RecipeError(f"--weight {odd[0]}: a weight is a finite number, such as 0.5")
    return list(wish.weights) or [1.0] * len(wish.adapters)


def _is_combined(wish: Wish) -> bool:
    """Whether PEFT makes one adapter of several, or of one with a weight.

    Raises:
        RecipeError: it knows no such way.
    """
    if wish.combine != SUM and wish.combine not in PEFTS:
        raise RecipeError(f"--combine {wish.combine}: there is {SUM} (the default), and PEFT's {', '.join(PEFTS)}")
    return wish.combine != SUM and (len(wish.adapters) > 1 or _weights(wish) != [1.0])


def _recipe(wish: Wish) -> Recipe:
    """The base as the first adapter with a note says that it was quantized; without such a note it is taken as it is."""
    known = next(filter(None, map(_quantization, wish.adapters)), {"load_in_4bit": False})
    raw: dict[str, Any] = {
        "task": "chat",
        "model": {"source": wish.base},
        "quantization": known,
        "data": {"test": [{"source": wish.rows}]} if wish.rows else {},
    }
    return from_dict(raw, wish.overrides, "qkit merge --base")


def _quantization(adapter: Path) -> dict[str, Any] | None:
    """How the base was quantized that an adapter was trained on, where a note of ours says so."""
    note = adapter / provenance.NOTE
    return json.loads(note.read_text(encoding="utf-8")).get("quantization") if note.is_file() else None


def _trained_otherwise(wish: Wish, how: Recipe) -> list[str]:
    """The adapters that were trained on the base in other precision than the one that they are measured on together."""
    taken, names = how.quantization.load_in_4bit, {True: "4 bit", False: "16 bit"}
    found = [(adapter, _quantization(adapter)) for adapter in wish.adapters]
    return [
        f"{adapter}: was trained on the base in {names[not taken]}, and is measured on it in {names[taken]}"
        for adapter, known in found
        if known is not None and bool(known.get("load_in_4bit")) != taken
    ]


def _checked(adapter: Path, folder: Path, base: str) -> list[str]:
    """What could not be checked of an adapter that is not ours; names and shapes are seen to while it is merged.

    Raises:
        ModelError: it is in this base already, or its note tells of another one.
    """
    config = Deltas(adapter).config
    if (adapter / provenance.NOTE).is_file():
        provenance.check_adapter(adapter, folder)
        return []
    provenance.check_not_merged(adapter, folder)
    said = str(config.base_model_name_or_path or "nothing")
    held = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    agree = Path(said).name.lower() in {Path(name).name.lower() for name in (base, str(folder), held) if name}
    names = f"names {said} as its base" + ("" if agree else f", and this one is {base}")
    return [
        f"{adapter}: {names}; only names and shapes of its weights could be checked, not that the base's values are those"
    ]


def _take_in(wish: Wish, weights: Sequence[float], folder: Path, out: Path, how: Recipe) -> None:
    """The adapter to merge, or a folder of all of them, in `out`, with a note."""
    if list(weights) == [1.0]:
        shutil.copytree(wish.adapters[0], out, ignore=shutil.ignore_patterns(*adapter_sum.LEFT_OUT))
    else:
        adapter_sum.write(out, wish.adapters, weights)
    combination_note(out, folder, how)


def _made(run: Run, alone: Run, wish: Wish, adapters: Mapping[str, float]) -> dict[str, Any]:
    """The candidates, each a folder, and which of them to take. `alone`: with the adapters that they are measured against."""
    ways = candidates.bases(run.recipe) if wish.rows else candidates.bases(run.recipe)[:1]
    spoken = _spoken(wish)
    gone = _prepare(run, wish.rows, spoken) if wish.rows else ""
    for base in ways:
        write_folder(run, candidates.folder_of(run.root, base), base, adapters)
    unmeasured: dict[str, Any] = {
        "chosen": ways[0],
        "note": "not measured: give rows with --data",
        "candidates": [],
        "beside": [],
    }
    table = _measured(run, alone, ways, adapters) if wish.rows else unmeasured
    if spoken:
        _take_tokenizer(spoken, candidates.folder_of(run.root, table["chosen"]))
    return (
        {**table, "note": "; ".join(filter(None, [f"measured on {wish.rows}", gone, table.get("note")]))}
        if gone
        else table
    )


def _spoken(wish: Wish) -> Path | None:
    """The adapter whose tokenizer and template the merged model speaks: one that has its own, where all that have say the same.

    Raises:
        ModelError: they do not.
    """
    having = [adapter for adapter in wish.adapters if (adapter / "tokenizer_config.json").is_file()]
    if len(having) > 1 and len({_said(adapter) for adapter in having}) > 1:
        raise ModelError(
            f"{having[0]} and {having[1]} hold tokenizers or chat templates that differ, and one model speaks one: take the tokenizer's files "
            "out of all folders but the one whose prompts the merged model is to be given"
        )
    return having[0] if having else None


def _said(adapter: Path) -> str:
    """Template, and what text becomes: two saved by different versions of a library may differ in all else."""
    tokenizer = added_tokens.bare_tokenizer(adapter, trust_remote_code=False)
    ids = tokenizer(SAMPLE, add_special_tokens=True)["input_ids"]
    return json.dumps([tokenizer.chat_template, sorted(tokenizer.get_vocab().items()), ids], sort_keys=True)


def _prepare(run: Run, source: str, spoken: Path | None) -> str:
    """The rows to measure on, tokenized as held-out ones by the tokenizer that the merged model will have; what is left out, in words."""
    how = run.recipe
    if spoken:
        words = run.root / "spoken"
        make_folder(words)
        copy_companions(model_source.companions(how.model), words)
        _take_tokenizer(spoken, words)
        how = how.model_copy(
            update={"model": how.model.model_copy(update={"source": str(words), "revision": None, "sha256": None})}
        )
    make_folder(run.folder("data"))
    summary = data_stage.prepare(how, run.folder("data"), run.progress)
    if not summary["splits"]["test"]["rows"]:
        raise DataError(f"--data {source}: no row of it can be used: {summary['dropped'] or 'it has none'}")
    return data_summary.left_out(summary, "test")


def _take_tokenizer(adapter: Path, out: Path) -> None:
    """Tokenizer, template and stop token of the adapter, and none of the base's: it was trained with these."""
    older_forms.drop_templates(out)
    for file in _tokenizer_files(out):
        file.unlink()
    for file in _tokenizer_files(adapter):
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, out / file.name)
    if (end := added_tokens.bare_tokenizer(out, trust_remote_code=False).eos_token_id) is not None:
        add_stop_tokens(out, [end])
    older_forms.settle(out, adapter)


def _tokenizer_files(folder: Path) -> set[Path]:
    return {file for pattern in (*TOKENIZER, *older_forms.TEMPLATES) for file in folder.glob(pattern)}


def _measured(run: Run, alone: Run, made: Sequence[str], adapters: Mapping[str, float]) -> dict[str, Any]:
    rows = held_out.read_held_out(run.need("data", "test.parquet")).rows
    reference = measure_reference.recorded(alone, rows)

    def measured(name: str) -> Candidate:
        run.progress.say(f"merge: measuring {name}")
        folder = candidates.folder_of(run.root, name)
        dtype = str(read_json(folder / "config.json")["dtype"])
        with open_runtime("transformers", folder, detect()) as runtime:
            found = parity.measure(reference, runtime.score(rows), dtype, dtype)
        return Candidate(name, candidates.describe(name), found)

    found = with_finer(run, run.root, [measured(name) for name in made], "fidelity", measured, adapters)
    best = candidates.choose(found, "fidelity")
    if (
        alone is run
    ):  # another way than the sum was asked for by name: its distance is shown, and what it is for is not known
        candidates.refuse_lost(best, "the merged model", LOST)
    table = candidates.table(found, "fidelity", [candidates.base_model(reference), candidates.apart(reference, None)])
    if best.parity and best.parity.lost:
        table["note"] = (
            f"nearer to the base alone than to all adapters active at once: --combine {SUM} is what keeps them"
        )
    write_json(candidates.folder_of(run.root, best.name) / candidates.FILE, table)
    return table
