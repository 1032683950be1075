"""The stage `merge`: adapter and base become one model, in each way that there is; the nearest to what was trained is kept.

merge/                  the model: shards, index, tokenizer, template, generation config, and qkit.json: what it was merged from
merge/candidates.json   every way with its distance to the live adapter, held-out loss and score; the winner's answers
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from qkit.core.device import detect
from qkit.core.errors import ParityFailed
from qkit.core.files import need_disk, read_json, write_json
from qkit.measure import candidates, gates, parity, scores
from qkit.measure import held_out as measure_held_out
from qkit.measure import reference as measure_reference
from qkit.measure.answers import answered
from qkit.measure.candidates import Candidate
from qkit.measure.held_out import HeldOut
from qkit.measure.parity import Reference
from qkit.merging.folder import write_folder
from qkit.model import provenance, source
from qkit.plugins.runtime import open_runtime
from qkit.recipe.schema import Base, Recipe
from qkit.run.directory import Run
from qkit.tensors.shards import shards

LOST = (
    "Nothing was written. Where the adapter has hardly moved (see train/metrics.jsonl) train longer or with a higher rate; "
    "else try another merge.base, or serve the adapter apart (export.formats: vllm-adapter)"
)


def run(run: Run, out: Path) -> None:
    """Make every candidate, measure each, and leave the chosen one.

    Raises:
        ModelError: the adapter does not belong to this base, is in it already, or is of a kind that is not merged.
        ParityFailed: the fine-tune is not in the best of them.
    """
    folder, ways = source.resolve(run.recipe.model), candidates.bases(run.recipe)
    provenance.check_adapter(run.need("train", "adapter"), folder)
    size = sum(shard.stat().st_size for shard in shards(folder))
    need_disk(out, size * min(len(ways), 2), "merge")
    held_out = measure_held_out.read_held_out(run.need("data", "test.parquet"))
    for base in ways:
        _make(run, out, base)
    reference = measure_reference.recorded(run, held_out.rows)

    def measure(name: str) -> Candidate:
        return _measured(run, out, Candidate(name, candidates.describe(name)), held_out, reference)

    measured = with_finer(run, out, [measure(base) for base in ways], run.recipe.merge.choose, measure)
    best = candidates.choose(measured, run.recipe.merge.choose)
    candidates.refuse_lost(best, "the merged model", LOST)
    _keep(candidates.folder_of(out, best.name), out)
    table = candidates.table(measured, run.recipe.merge.choose, _beside(run, folder, held_out, reference))
    write_json(out / candidates.FILE, {**table, "texts": best.texts})
    if table["otherwise"]:
        run.progress.say(f"merge: {best.name} is kept; {table['otherwise']['words']}")


def _make(run: Run, out: Path, base: Base) -> None:
    """One merged model, whole, in a folder of its own."""
    run.progress.say(f"merge: {base}")
    write_folder(run, candidates.folder_of(out, base), base)


NOTICED = 1e-3  # nats of mean KL per token: what a merge in bfloat16 may cost before float16 is tried


def _rounds_too_much(how: Recipe, best: Candidate) -> bool:
    """Whether the best merge is as far off as one would notice, and there is a finer dtype: small deltas get lost between numbers of bfloat16.

    Also where its gate lets it pass, because computing in bfloat16 costs as much. A gate that the recipe moves changes what is accepted, not
    what is made: the merge need not be made again for it.
    """
    limit = max(NOTICED, gates.default_gate("merged", how).kl_mean or 0.0)
    return len(how.merge.dtypes) > 1 and best.parity is not None and not best.parity.kl_mean <= limit


def with_finer(
    run: Run,
    out: Path,
    found: Sequence[Candidate],
    rule: str,
    measured: Callable[[str], Candidate],
    adapters: Mapping[str, float] | None = None,
) -> list[Candidate]:
    """These, and the best of them in float16 where bfloat16 rounds too much of it away. The others make room for it on the disk.

    `measured`: what measures one by its name. Some models do not run in float16, as their activations overflow: it is left out then.
    """
    best = candidates.choose(found, rule)
    if not _rounds_too_much(run.recipe, best):
        return [*found]
    name = _write_finer(run, out, best, adapters)
    try:
        return [*found, measured(name)]
    except ParityFailed as error:
        run.progress.say(f"merge: {name} is left out: {error}")
        return [*found]


def _write_finer(run: Run, out: Path, best: Candidate, adapters: Mapping[str, float] | None) -> str:
    """The best one again in float16, beside it and no other. Returns its name."""
    assert best.parity is not None
    run.progress.say(
        f"merge: {best.name} in bfloat16 has lost some of the change (KL {best.parity.kl_mean:.4f}); float16 is tried"
    )
    for folder in candidates.folder_of(out, best.name).parent.iterdir():
        if folder.name != best.name:
            shutil.rmtree(folder)
    name = best.name + candidates.FINER
    base, dtype = candidates.base_of(best.name), run.recipe.merge.dtypes[-1]
    write_folder(run, candidates.folder_of(out, name), base, adapters, dtype=dtype)
    return name


def _measured(run: Run, out: Path, candidate: Candidate, held_out: HeldOut, reference: Reference) -> Candidate:
    """Its distance to the live adapter, and its score beside the live adapter's on the same rows."""
    run.progress.say(f"merge: measuring {candidate.name}")
    folder = candidates.folder_of(out, candidate.name)
    dtype = str(read_json(folder / "config.json")["dtype"])
    with open_runtime("transformers", folder, detect()) as runtime:
        own = answered(run, runtime, held_out)
        found = parity.measure(reference, runtime.score(held_out.rows), dtype, dtype)
    return replace(
        candidate,
        parity=found,
        score=asdict(scores.score(own.right, found.heldout_loss, run.recipe.evaluate, run.recipe.seed)),
        gain=gates.gain_over_reference(run, own.right),
        texts=own.texts,
    )


def _beside(run: Run, folder: Path, held_out: HeldOut, reference: Reference) -> Sequence[Candidate]:
    """What needs no merge: the base model, and the adapter kept apart."""
    score = read_json(run.need("evaluate", "scores.json"))["scores"]["adapter"]
    rows = [candidates.base_model(reference), candidates.apart(reference, score)]
    return [*rows, _apart_on_16_bit(run, folder, held_out, reference)] if run.recipe.quantization.load_in_4bit else rows


def _apart_on_16_bit(run: Run, folder: Path, held_out: HeldOut, reference: Reference) -> Candidate:
    """The adapter as vLLM serves it beside its base; measured where the recipe exports it so."""
    row = Candidate("adapter-16bit", "the adapter apart, on the base's 16-bit weights: as vLLM serves it")
    if "vllm-adapter" not in run.recipe.export.formats:
        return replace(row, note="not measured: the same sums as the merge into 16bit, rounded elsewhere")
    run.progress.say("merge: measuring the adapter apart on the 16-bit base")
    quantization = run.recipe.quantization.model_copy(update={"load_in_4bit": False})
    how, adapter = run.recipe.model_copy(update={"quantization": quantization}), run.need("train", "adapter")
    with open_runtime("transformers", folder, detect(), recipe=how, adapter=adapter) as runtime:
        return replace(row, parity=parity.measure(reference, runtime.score(held_out.rows), weights="float32"))


def _keep(chosen: Path, out: Path) -> None:
    """Put the chosen model in its place; the others go."""
    for file in chosen.iterdir():
        file.rename(out / file.name)
    shutil.rmtree(chosen.parent)
