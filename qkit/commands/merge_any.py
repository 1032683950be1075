"""`qkit merge --base B --adapter A --out D`: merges adapters and bases from anywhere, and measures the result on the user's own rows.

It builds what a run would hold in a temporary folder next to D (the adapter or adapters, the tokenized rows), so that merging and measuring are
the same code as in the stage `merge`. However several adapters are combined, the result is measured against all of them active at once, each
with its weight (model/adapters/sums.py), and never against what combining made of them.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.commands.combine import PEFT_METHODS, SUM, combined_adapter, ensure_note
from qkit.core.device import detect
from qkit.core.errors import DataError, MissingArtifact, ModelError, RecipeError
from qkit.core.files import make_folder, need_disk, write_json
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.data import summary as data_summary
from qkit.measure import candidates, held_out
from qkit.measure import reference as measure_reference
from qkit.measure.candidates import Candidate, CandidateResult
from qkit.merging.folder import add_stop_tokens, write_folder
from qkit.model import added_tokens, older_forms, provenance
from qkit.model import source as model_source
from qkit.model.adapters import sums as adapter_sum
from qkit.plugins.runtime import open_runtime
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.tensors.companions import copy_companions, tokenizer_files
from qkit.tensors.lora_deltas import Deltas
from qkit.tensors.shards import shards

if TYPE_CHECKING:
    from qkit.commands.combine import MergeRequest


LOST = (
    "It was measured on the rows given with --data: check that they are of the kind that the adapter was trained on. "
    "Otherwise serve the adapter unmerged"
)
SAMPLE = "Steps:\n\n1. Do it\u0301 by 2025-01-02, \u3053\u3093\u306b\u3061\u306f 🙂\n\treturn x['a']  # 1234567"


def merge(request: MergeRequest, progress: Progress) -> dict[str, Any]:
    """Merge, measure if there are rows, and move the folder into place once it is complete.

    Returns the table of candidates with `out` and `notes`: what could not be checked.

    Raises:
        ModelError, MissingArtifact: the adapter or the base cannot be merged, or the adapter is known to belong to another base.
        RecipeError, DataError: the request is not clear, or no row can be used.
        ParityFailed: the merged model has lost the fine-tune.
    """
    weights, is_combined = _weights(request), _is_combined(request)
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise MissingArtifact(
            f"{request.out}: already exists and is not empty; give --out a new folder", path=request.out
        )
    make_folder(request.out.parent)
    recipe = recipe_for(request)
    folder = model_source.resolve(recipe.model)
    notes = [note for adapter in request.adapters for note in _check_base(adapter, folder, request.base)]
    notes += precision_notes(request, recipe)
    need_disk(request.out.parent, 2 * sum(shard.stat().st_size for shard in shards(folder)), "merge")
    with tempfile.TemporaryDirectory(dir=request.out.parent, prefix=f".{request.out.name}-") as temporary:
        run = Run(Path(temporary), recipe, progress)
        reference_run = Run(run.root / "alone", recipe, progress) if is_combined else run  # holds the adapters as given
        _copy_adapters(request, weights, folder, reference_run.folder("train") / "adapter", recipe)
        if is_combined:
            notes += combined_adapter(request, weights, folder, run, recipe)
        made, table = _make(run, reference_run, request, _hashes(request, weights))
        if request.out.exists():
            request.out.rmdir()
        made.rename(request.out)
    return {"out": str(request.out), "notes": [*notes, *_tokenizer_notes(request.out)], **table}


# --- the request ------------------------------------------------------------------------------------------------------


def _weights(request: MergeRequest) -> list[float]:
    if not request.adapters:
        raise RecipeError("at least one --adapter is required")
    if request.weights and len(request.weights) != len(request.adapters):
        raise RecipeError(
            f"--adapter is given {len(request.adapters)} times and --weight {len(request.weights)} times: give one weight for each adapter"
        )
    if wrong := [weight for weight in request.weights if not isfinite(weight)]:
        raise RecipeError(f"--weight {wrong[0]}: a weight must be a finite number, such as 0.5")
    return list(request.weights) or [1.0] * len(request.adapters)


def _is_combined(request: MergeRequest) -> bool:
    """Whether PEFT combines several adapters, or one with a weight, into one adapter.

    Raises:
        RecipeError: the method is unknown.
    """
    if request.combine != SUM and request.combine not in PEFT_METHODS:
        raise RecipeError(
            f"--combine {request.combine}: unknown method; the methods are {SUM} (the default) and PEFT's {', '.join(PEFT_METHODS)}"
        )
    return request.combine != SUM and (len(request.adapters) > 1 or _weights(request) != [1.0])


def recipe_for(request: MergeRequest) -> Recipe:
    """A recipe for the base, quantized as the note of the first adapter with one says, or not quantized if none has a note."""
    known = next(filter(None, map(_quantization, request.adapters)), {"load_in_4bit": False})
    raw: dict[str, Any] = {
        "task": "chat",
        "model": {"source": request.base},
        "quantization": known,
        "data": {"test": [{"source": request.rows}]} if request.rows else {},
    }
    return from_dict(raw, request.overrides, "qkit merge --base")


def _quantization(adapter: Path) -> dict[str, Any] | None:
    """How the base was quantized when the adapter was trained, if qkit's note in the adapter's folder says so."""
    note = adapter / provenance.NOTE
    return json.loads(note.read_text(encoding="utf-8")).get("quantization") if note.is_file() else None


# --- the adapters -----------------------------------------------------------------------------------------------------


def _hashes(request: MergeRequest, weights: Sequence[float]) -> dict[str, float]:
    """Hash of each adapter -> its weight; an adapter that is named twice has the sum."""
    hashes: dict[str, float] = {}
    for adapter, weight in zip(request.adapters, weights, strict=True):
        digest = provenance.adapter_sha256(adapter)
        hashes[digest] = hashes.get(digest, 0.0) + weight
    return hashes


def precision_notes(request: MergeRequest, recipe: Recipe) -> list[str]:
    """A note for each adapter that was trained on the base in another precision than the one used to measure."""
    measured_in_4bit, names = recipe.quantization.load_in_4bit, {True: "4-bit", False: "16-bit"}
    notes = []
    for adapter in request.adapters:
        known = _quantization(adapter)
        if known is not None and bool(known.get("load_in_4bit")) != measured_in_4bit:
            trained, measured = names[not measured_in_4bit], names[measured_in_4bit]
            notes.append(f"{adapter}: was trained on the {trained} base, and is measured on the {measured} one")
    return notes


def _check_base(adapter: Path, folder: Path, base: str) -> list[str]:
    """A note on what could not be checked of an adapter that qkit did not train; names and shapes are checked while merging.

    Raises:
        ModelError: the adapter is already merged into this base, or its note names another base.
    """
    config = Deltas(adapter).config
    if (adapter / provenance.NOTE).is_file():
        provenance.check_adapter(adapter, folder)
        return []
    provenance.check_not_merged(adapter, folder)
    named = str(config.base_model_name_or_path or "nothing")
    original = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    agree = Path(named).name.lower() in {Path(name).name.lower() for name in (base, str(folder), original) if name}
    difference = "" if agree else f", and this one is {base}"
    return [
        f"{adapter}: names {named} as its base{difference}; only the names and shapes of its weights could be checked, not the base's values"
    ]


def _copy_adapters(request: MergeRequest, weights: Sequence[float], folder: Path, out: Path, recipe: Recipe) -> None:
    """Copy the adapter, or all of them as one folder with their weights, to `out`, with a note."""
    if list(weights) == [1.0]:
        shutil.copytree(request.adapters[0], out, ignore=shutil.ignore_patterns(*adapter_sum.LEFT_OUT))
    else:
        adapter_sum.write(out, request.adapters, weights)
    ensure_note(out, folder, recipe)


# --- making and measuring ---------------------------------------------------------------------------------------------


def _make(
    run: Run, reference_run: Run, request: MergeRequest, adapters: Mapping[str, float]
) -> tuple[Path, dict[str, Any]]:
    """The folder of the best candidate, and the table. `reference_run`: holds the adapters to measure against."""
    tokenizer_adapter = tokenizer_adapter_of(request)

    def make(candidate: Candidate) -> Path:
        folder = candidates.folder_of(run.root, candidate)
        write_folder(run, folder, candidate.base, adapters, dtype=candidate.dtype)
        return folder

    if request.rows:
        left_out = prepare_rows(run, request.rows, tokenizer_adapter)
        folder, table = _choose(run, reference_run, make)
        if left_out:
            notes = [f"measured on {request.rows}", left_out, table.get("note")]
            table["note"] = "; ".join(filter(None, notes))
    else:
        first = candidates.merge_candidates(run.recipe)[0]
        folder = make(first)
        note = "not measured: give rows with --data"
        table = {"chosen": first.name, "note": note, "candidates": [], "beside": []}
    if tokenizer_adapter:
        _take_tokenizer(tokenizer_adapter, folder)
    return folder, table


def _choose(run: Run, reference_run: Run, make: Callable[[Candidate], Path]) -> tuple[Path, dict[str, Any]]:
    rows = held_out.held_out_of(run).rows
    reference = functools.cache(lambda: measure_reference.recorded(reference_run, rows))  # once the merges are made

    def measure(candidate: Candidate, folder: Path) -> CandidateResult:
        run.progress.notify(f"merge: measuring {candidate.name}")
        with open_runtime("transformers", folder, detect()) as runtime:
            return CandidateResult.of(candidate, candidates.merged_parity(reference(), folder, runtime.score(rows)))

    choice = candidates.choose_best(
        candidates.merge_candidates(run.recipe),
        make=make,
        measure=measure,
        rule="fidelity",
        finer=candidates.finer_merge(run),
        notify=lambda message: run.progress.notify(f"merge: {message}"),
    )
    if reference_run is run:  # a method other than the sum was chosen by name: its distance is shown, and not judged
        choice.refuse_lost("merged", "the merged model", LOST)
    table = choice.table([candidates.base_row(reference()), candidates.adapter_row(reference(), None)])
    if choice.result.parity and choice.result.parity.lost:
        table["note"] = (
            f"closer to the base model than to all adapters active at once: --combine {SUM} is the method that keeps them"
        )
    write_json(choice.folder / candidates.FILE, table)
    return choice.folder, table


def prepare_rows(run: Run, source: str, tokenizer_adapter: Path | None) -> str:
    """Tokenize the rows to measure on with the tokenizer that the merged model will have. Returns which rows are left out."""
    recipe = run.recipe
    if tokenizer_adapter:
        folder = run.root / "tokenizer"
        make_folder(folder)
        copy_companions(model_source.companions(recipe.model), folder)
        _take_tokenizer(tokenizer_adapter, folder)
        model = recipe.model.model_copy(update={"source": str(folder), "revision": None, "sha256": None})
        recipe = recipe.model_copy(update={"model": model})
    make_folder(run.folder("data"))
    summary = data_stage.prepare(recipe, run.folder("data"), run.progress)
    if not summary["splits"]["test"]["rows"]:
        reason = summary["dropped"] or "it is empty"
        raise DataError(f"--data {source}: no row can be used: {reason}", source=source)
    return data_summary.left_out(summary, "test")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_adapter_of(request: MergeRequest) -> Path | None:
    """The adapter whose tokenizer and chat template the merged model gets: the first that has them. All that have them must agree.

    Raises:
        ModelError: they differ.
    """
    having = [adapter for adapter in request.adapters if (adapter / older_forms.TOKENIZER).is_file()]
    if len(having) > 1 and len({_tokenizer_content(adapter) for adapter in having}) > 1:
        raise ModelError(
            f"{having[0]} and {having[1]} hold different tokenizers or chat templates, and a model has one: remove the tokenizer files "
            "from every adapter folder except the one whose prompts the merged model will be given",
            source=having[1],
        )
    return having[0] if having else None


def _tokenizer_content(adapter: Path) -> str:
    """Template, vocabulary and the ids of a sample; the files of two library versions may differ in everything else."""
    tokenizer = added_tokens.bare_tokenizer(adapter, trust_remote_code=False)
    ids = tokenizer(SAMPLE, add_special_tokens=True)["input_ids"]
    return json.dumps([tokenizer.chat_template, sorted(tokenizer.get_vocab().items()), ids], sort_keys=True)


def _take_tokenizer(adapter: Path, out: Path) -> None:
    """Replace the base's tokenizer, template and stop token in `out` by the adapter's: it was trained with these."""
    older_forms.drop_templates(out)
    for file in tokenizer_files(out):
        file.unlink()
    for file in tokenizer_files(adapter):
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, out / file.name)
    if (end := added_tokens.bare_tokenizer(out, trust_remote_code=False).eos_token_id) is not None:
        add_stop_tokens(out, [end])
    older_forms.settle(out, adapter)


def _tokenizer_notes(out: Path) -> list[str]:
    """A note if transformers 5, which measured here, splits text differently from tokenizer.json, which all other readers use."""
    if not (out / older_forms.TOKENIZER).is_file():
        return []
    try:
        tokenizer = added_tokens.bare_tokenizer(out, trust_remote_code=False)
    except ModelError:
        return []  # a tokenizer of remote code, which is the same program for every reader
    if older_forms.cuts_alike(tokenizer, out):
        return []
    return [
        f"transformers 5 splits text by rules that its {type(tokenizer).__name__} has for this kind of model; all other readers use those of "
        f"{older_forms.CUTS}, and they differ, so prompts may become other tokens: compare with what the adapter was trained on"
    ]
