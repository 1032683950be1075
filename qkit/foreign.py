"""`qkit merge --base B --adapter A --out D`: adapters and bases from anywhere, one or several, measured on somebody's own rows.

What a run would hold is made in a folder beside `D` (the adapter, a combined one if there are several; the rows, tokenized), so that the
merge and its measurement are those of the stage.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit import added_tokens, candidates, data, live, model, parity, provenance, scoring
from qkit.candidates import Candidate
from qkit.deltas import Deltas
from qkit.device import detect
from qkit.errors import DataError, MissingArtifact, ModelError, RecipeError
from qkit.merge import with_finer
from qkit.merged_folder import add_stop_token, write_folder
from qkit.progress import Progress
from qkit.recipe import Recipe, from_dict
from qkit.run import Run, make_folder, need_disk, read_json, write_json
from qkit.runtime import open_runtime
from qkit.tensor_files import shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOST = (
    "Measured on the rows given with --data; are they of the kind that it was trained on? Else serve the adapter apart"
)
BESIDE_DELTAS = (
    "use_dora",
    "modules_to_save",
    "bias",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
)  # of a LoraConfig
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Wish:
    """What to merge. `weights`: one for each adapter, or none: 1 each. `combine`, `density`: PEFT's add_weighted_adapter's.

    `rows`: a data set to measure on, in the formats of `data.test`.
    """

    base: str
    adapters: Sequence[Path]
    out: Path
    weights: Sequence[float] = ()
    combine: str = "linear"
    density: float = 0.5
    rows: str | None = None
    overrides: Sequence[str] = ()


def merge(wish: Wish, progress: Progress) -> dict[str, Any]:
    """Merge, measure where there are rows, and put the folder in its place when it is whole; what was done and could not be checked.

    Raises:
        ModelError, MissingArtifact: the adapter, or the base, cannot be merged, or the one is known not to belong to the other.
        RecipeError, DataError: the wish is not clear, or no row can be used. ParityFailed: the fine-tune is not in the merged model.
    """
    weights = _weights(wish)
    if wish.out.exists() and (not wish.out.is_dir() or any(wish.out.iterdir())):
        raise MissingArtifact(f"{wish.out}: is there already and is not empty; give --out a new folder")
    make_folder(wish.out.parent)
    how = _recipe(wish)
    folder = model.resolve(how.model)
    notes = [note for adapter in wish.adapters for note in _checked(adapter, folder, wish.base)]
    need_disk(wish.out.parent, 2 * sum(shard.stat().st_size for shard in shards(folder)), "merge")
    with tempfile.TemporaryDirectory(dir=wish.out.parent, prefix=f".{wish.out.name}-") as temporary:
        run = Run(Path(temporary), how, progress)
        _take_in(wish, weights, folder, run.folder("train") / "adapter", how)
        table = _made(run, wish, {provenance.adapter_sha256(a): w for a, w in zip(wish.adapters, weights, strict=True)})
        if wish.out.exists():
            wish.out.rmdir()
        candidates.folder_of(run.root, table["chosen"]).rename(wish.out)
    return {"out": str(wish.out), "notes": notes, **table}


def _weights(wish: Wish) -> list[float]:
    if not wish.adapters:
        raise RecipeError("name at least one --adapter")
    if wish.weights and len(wish.weights) != len(wish.adapters):
        raise RecipeError(
            f"{len(wish.adapters)} times --adapter and {len(wish.weights)} times --weight: give one for each"
        )
    return list(wish.weights) or [1.0] * len(wish.adapters)


def _recipe(wish: Wish) -> Recipe:
    """The base as the adapter's note says that it was quantized; without such a note it is taken as it is."""
    note = wish.adapters[0] / provenance.NOTE
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    raw: dict[str, Any] = {
        "task": "chat",
        "model": {"source": wish.base},
        "quantization": known.get("quantization", {"load_in_4bit": False}),
        "data": {"test": [{"source": wish.rows}]} if wish.rows else {},
    }
    return from_dict(raw, wish.overrides, "qkit merge --base")


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
    """The one adapter to merge, in `out`, with a note."""
    if len(wish.adapters) == 1 and weights == [1.0]:
        shutil.copytree(wish.adapters[0], out, ignore=shutil.ignore_patterns("checkpoint*", "*.bin", "*.pt"))
    else:
        combine(wish, weights, folder, out, how.seed)
    if not (out / provenance.NOTE).is_file():
        names = _quantized(folder, how) if how.quantization.load_in_4bit else []
        provenance.write_adapter_note(out, folder, how, names)


def combine(wish: Wish, weights: Sequence[float], folder: Path, out: Path, seed: int) -> None:
    """One adapter of several, by PEFT; the base's weights are not needed for it.

    Raises:
        ModelError: PEFT does not combine these, or not in this way.
    """
    import torch
    from peft import PeftModel

    _need_plain(wish.adapters)
    torch.manual_seed(seed)  # DARE drops at random
    names = [f"adapter{index}" for index in range(len(wish.adapters))]
    try:
        held = PeftModel.from_pretrained(_weightless(folder), str(wish.adapters[0]), adapter_name=names[0])
        for name, adapter in zip(names[1:], wish.adapters[1:], strict=True):
            held.load_adapter(str(adapter), adapter_name=name)
        options = {} if wish.combine in {"linear", "cat", "svd"} else {"density": wish.density}
        held.add_weighted_adapter(names, list(weights), "combined", combination_type=wish.combine, **options)
        held.peft_config["combined"].use_rslora = False  # each one's scaling is in the sum already
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"PEFT does not combine these adapters by {wish.combine}: {str(error).splitlines()[0]}"
        ) from error
    with tempfile.TemporaryDirectory(dir=_parent(out)) as temporary:
        held.save_pretrained(temporary, selected_adapters=["combined"], save_embedding_layers=False)
        (Path(temporary) / "combined").rename(out)


def _need_plain(adapters: Sequence[Path]) -> None:
    """PEFT sums low-rank deltas; of what else an adapter has it takes the first one's, or zeros, without a word.

    Raises:
        ModelError: one of them has more than such deltas.
    """
    for adapter in adapters:
        config = Deltas(adapter).config
        odd = [key for key in BESIDE_DELTAS if getattr(config, key, None) not in (None, False, [], {}, "none")]
        if odd:
            raise ModelError(
                f"{adapter}: has {', '.join(odd)}, which PEFT does not combine or weigh; merge it alone, with no --weight, "
                "and the next one into what comes of it"
            )


def _parent(out: Path) -> Path:
    make_folder(out.parent)
    return out.parent


def _weightless(folder: Path) -> PreTrainedModel:
    """The model with weights of one zero each, that are as wide as the real ones: PEFT asks for shapes alone."""
    import torch

    made = added_tokens.skeleton(folder, False)
    for module in made.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(held.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return made


def _quantized(folder: Path, how: Recipe) -> list[str]:
    """The weights that would be held in 4 bit: transformers decides, on a model without weights."""
    from transformers.quantizers import AutoHfQuantizer

    made = added_tokens.skeleton(folder, how.model.trust_remote_code)
    quantizer = AutoHfQuantizer.from_config(model.quantization_config(how.quantization), pre_quantized=False)
    quantizer.preprocess_model(model=made, device_map=None)
    return model.quantized_names(made)


def _made(run: Run, wish: Wish, adapters: Mapping[str, float]) -> dict[str, Any]:
    """The candidates, each a folder, and which of them to take."""
    ways = candidates.bases(run.recipe) if wish.rows else candidates.bases(run.recipe)[:1]
    gone = _prepare(run, wish.rows) if wish.rows else ""
    spoken = run.folder("train") / "adapter" if len(wish.adapters) > 1 else wish.adapters[0]
    for base in ways:
        write_folder(run, candidates.folder_of(run.root, base), base, adapters)
    unmeasured: dict[str, Any] = {
        "chosen": ways[0],
        "note": "not measured: give rows with --data",
        "candidates": [],
        "beside": [],
    }
    table = _measured(run, ways, adapters) if wish.rows else unmeasured
    _take_tokenizer(spoken, candidates.folder_of(run.root, table["chosen"]))
    return {**table, "note": f"measured on {wish.rows}; {gone}"} if gone else table


def _prepare(run: Run, source: str) -> str:
    """The rows to measure on, tokenized as held-out ones; what is left out of them, in words."""
    make_folder(run.folder("data"))
    summary = data.prepare(run.recipe, run.folder("data"), run.progress)
    if not summary["splits"]["test"]["rows"]:
        raise DataError(f"--data {source}: no row of it can be used: {summary['dropped'] or 'it has none'}")
    return data.left_out(summary, "test")


def _take_tokenizer(adapter: Path, out: Path) -> None:
    """Tokenizer, template and stop token of the adapter, where it has its own, and none of the base's: it was trained with these."""
    if not (adapter / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    for file in _tokenizer_files(out):
        file.unlink()
    for file in _tokenizer_files(adapter):
        shutil.copyfile(file, out / file.name)
    if (end := AutoTokenizer.from_pretrained(str(out)).eos_token_id) is not None:
        add_stop_token(out, end)


def _tokenizer_files(folder: Path) -> set[Path]:
    return {file for pattern in TOKENIZER for file in folder.glob(pattern)}


def _measured(run: Run, made: Sequence[str], adapters: Mapping[str, float]) -> dict[str, Any]:
    rows = scoring.read_held_out(run.need("data", "test.parquet")).rows
    reference = live.recorded(run, rows)

    def measured(name: str) -> Candidate:
        run.progress.say(f"merge: measuring {name}")
        folder = candidates.folder_of(run.root, name)
        dtype = str(read_json(folder / "config.json")["dtype"])
        with open_runtime("transformers", folder, detect()) as runtime:
            found = parity.measure(reference, runtime.score(rows), dtype, dtype)
        return Candidate(name, candidates.describe(name), found)

    found = with_finer(run, run.root, [measured(name) for name in made], "fidelity", measured, adapters)
    best = candidates.choose(found, "fidelity")
    candidates.refuse_lost(best, "the merged model", LOST)
    table = candidates.table(found, "fidelity", [candidates.base_model(reference), candidates.apart(reference, None)])
    write_json(candidates.folder_of(run.root, best.name) / candidates.FILE, table)
    return table
