"""The stage `merge`: merges the adapter into the base in every way that applies, and keeps the one closest to what was trained.

merge/                  the model: shards, index, tokenizer, template, generation config, and qkit.json, which says what was merged
merge/candidates.json   every candidate with its distance to the reference model, held-out loss and score; the answers of the one kept
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qkit.core.device import detect
from qkit.core.errors import RecipeError
from qkit.core.files import need_disk, read_json, write_json
from qkit.measure import candidates, gates, parity
from qkit.measure import held_out as measure_held_out
from qkit.measure import reference as measure_reference
from qkit.measure.answers import answered, scored
from qkit.measure.candidates import Candidate, CandidateResult
from qkit.measure.held_out import HeldOut
from qkit.measure.parity import Reference
from qkit.merging.folder import write_folder
from qkit.model import provenance, source
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.registry import is_unmerged
from qkit.recipe.schema import WHOLE, Recipe
from qkit.run.directory import Run
from qkit.tensors.shards import shards

WHOLE_DESCRIPTION = "the trained weights, rounded: nothing was merged"
LOST = (
    "Nothing was written. If the {trained} hardly moved (see train/metrics.jsonl), train longer or with a higher learning rate. "
    "Otherwise {remedy}"
)
MORE_BITS = "set merge.dtype=float32"
UNMERGED = "try another merge.base, or serve the adapter unmerged (export.formats: vllm-adapter)"


def run(run: Run, out: Path) -> None:
    """Make every candidate, measure each, and keep the best in `out`.

    Raises:
        RecipeError: the recipe's method makes an adapter that cannot be merged.
        ModelError: the adapter does not belong to this base, is already merged into it, or is of a kind that cannot be merged.
        ParityFailed: even the best candidate has lost the fine-tune.
    """
    if is_unmerged(run.recipe):
        raise RecipeError(
            f"method={run.recipe.method}: no weight can take up a bottleneck adapter, so there is nothing to merge; `qkit export {run.root}` "
            "makes the onnx formats of base and adapter together"
        )
    folder, variants = source.resolve(run.recipe.model), candidates.merge_candidates(run.recipe)
    provenance.check_adapter(run.trained(), folder)
    if run.recipe.method in WHOLE:
        run.progress.notify(
            "merge: nothing to merge: the weights themselves were trained, and are rounded and measured"
        )
    size = sum(shard.stat().st_size for shard in shards(folder))
    need_disk(out, size * min(len(variants), 2), "merge")
    held_out = measure_held_out.held_out_of(run)
    reference = functools.cache(lambda: measure_reference.recorded(run, held_out.rows))  # once the merges are made

    choice = candidates.choose_best(
        variants,
        make=lambda candidate: _make(run, out, candidate),
        measure=lambda candidate, made: measure(run, candidate, made, held_out, reference()),
        rule=run.recipe.merge.choose,
        finer=candidates.finer_merge(run),
        notify=lambda message: run.progress.notify(f"merge: {message}"),
    )
    choice.refuse_lost("merged", "the merged model", _lost(run.recipe))
    _keep(choice.folder, out)
    table = choice.table(_reference_rows(run, folder, held_out, reference()))
    write_json(out / candidates.FILE, {**table, "texts": choice.result.texts})
    if table["otherwise"]:
        run.progress.notify(f"merge: {choice.candidate.name} is kept; {table['otherwise']['words']}")


def _lost(recipe: Recipe) -> str:
    """What to do about a merge that has lost the fine-tune."""
    trained = "weights have" if recipe.method in WHOLE else "adapter has"
    return LOST.format(trained=trained, remedy=UNMERGED if recipe.method == "lora" else MORE_BITS)


def _make(run: Run, out: Path, candidate: Candidate) -> Path:
    """Write one whole merged model to a folder of its own."""
    what = f"the trained weights in {candidate.dtype or run.recipe.merge.dtypes[0]}"
    run.progress.notify(f"merge: {what if run.recipe.method in WHOLE else candidate.name}")
    folder = candidates.folder_of(out, candidate)
    write_folder(run, folder, candidate.base, dtype=candidate.dtype)
    return folder


def measure(run: Run, candidate: Candidate, folder: Path, held_out: HeldOut, reference: Reference) -> CandidateResult:
    """Parity to the reference model, and its score next to the reference model's on the same rows."""
    run.progress.notify(f"merge: measuring {candidate.name}")
    with open_runtime("transformers", folder, detect(), head=open_task(run.recipe.task).HEAD) as runtime:
        answers = answered(run, runtime, held_out)
        scores_of_rows = open_task(run.recipe.task).outputs(runtime, held_out.rows)
        distance = candidates.merged_parity(reference, folder, scores_of_rows)
    result = CandidateResult.of(candidate, distance)
    return replace(
        result,
        description=WHOLE_DESCRIPTION if run.recipe.method in WHOLE else result.description,
        score=scored(run, answers, held_out, distance.heldout_loss),
        gain=gates.gain_over_reference(run, answers.grades, held_out),
        texts=answers.texts,
    )


def _reference_rows(run: Run, folder: Path, held_out: HeldOut, reference: Reference) -> Sequence[CandidateResult]:
    """What needs no merge: the base model, and the unmerged adapter."""
    score = read_json(run.need("evaluate", "scores.json"))["scores"][run.recipe.trained_as]
    trained = candidates.adapter_row(reference, score)
    if run.recipe.method in WHOLE:
        trained = replace(trained, description="the trained weights, computed in bf16")
    rows = [candidates.base_row(reference), trained]
    if run.recipe.quantization.load_in_4bit:
        rows.append(_adapter_on_16_bit(run, folder, held_out, reference))
    return rows


def _adapter_on_16_bit(run: Run, folder: Path, held_out: HeldOut, reference: Reference) -> CandidateResult:
    """The unmerged adapter on the 16-bit base, as vLLM serves it; measured only if the recipe exports it that way."""
    row = CandidateResult("adapter-16bit", "the unmerged adapter on the base's 16-bit weights, as vLLM serves it")
    if "vllm-adapter" not in run.recipe.export.formats:
        return replace(row, note="not measured: the same computation as the 16bit merge, rounded at other points")
    run.progress.notify("merge: measuring the unmerged adapter on the 16-bit base")
    quantization = run.recipe.quantization.model_copy(update={"load_in_4bit": False})
    recipe, adapter = run.recipe.model_copy(update={"quantization": quantization}), run.trained()
    with open_runtime("transformers", folder, detect(), recipe=recipe, adapter=adapter) as runtime:
        return replace(
            row,
            parity=parity.measure(
                reference, open_task(run.recipe.task).outputs(runtime, held_out.rows), weights="float32"
            ),
        )


def _keep(chosen: Path, out: Path) -> None:
    """Move the chosen model into place and delete the others."""
    for file in chosen.iterdir():
        file.rename(out / file.name)
    shutil.rmtree(chosen.parent)
