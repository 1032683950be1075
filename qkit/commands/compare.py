"""Measures how far one model is from another on the same token ids. Each is a run (its reference model), a model folder, an export or a server.

Only one is open at a time: the scores of the first are kept on disk while the second runs.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.commands import _compare_labels
from qkit.core.device import detect
from qkit.core.errors import DataError, MissingArtifact, ParityFailed
from qkit.core.files import read_json
from qkit.core.sequences import first_difference
from qkit.data.summary import left_out
from qkit.measure import contract, evidence, reference
from qkit.measure import held_out as measure_held_out
from qkit.measure import scores as measure_scores
from qkit.measure.artifacts import Artifact, open_artifact
from qkit.measure.divergence import Distances
from qkit.measure.held_out import HeldOut
from qkit.model import provenance, source
from qkit.model import tokenizer as model_tokenizer
from qkit.plugins.exporter import exporter
from qkit.plugins.runtime import RowScores, Runtime, open_runtime
from qkit.plugins.task import ModelHead, open_task
from qkit.recipe.registry import MERGED
from qkit.recipe.schema import Evaluate, Recipe, Serve, Source
from qkit.run.directory import Run
from qkit.server.client import root_url

if TYPE_CHECKING:
    from qkit.core.progress import Progress


@dataclass(frozen=True)
class Side:
    """One of the two models. `runtime` opens it. `run`: the run that it is or that made it. A server has a URL and no path."""

    name: str
    runtime: str
    path: Path | None = None
    url: str = ""
    export_format: str = ""
    run: Run | None = None

    @property
    def is_reference(self) -> bool:
        """Whether this is a run's reference model: base + adapter as trained."""
        return self.run is not None and self.path == self.run.root

    @property
    def description(self) -> str:
        """Name, kind and runtime, for a person."""
        kind = (
            "the reference model"
            if self.is_reference
            else self.export_format or ("a server" if self.url else "a model folder")
        )
        return f"{self.name} ({kind}, {self.runtime})"


@dataclass(frozen=True)
class ComparisonRows:
    """The rows that both models are compared on, with the settings of their task.

    `where`: description of the rows for a person. `held_out_of`: the run whose held-out rows these are, if any.
    """

    held_out: HeldOut
    stop: frozenset[int]
    task: str
    section: Evaluate
    seed: int
    where: str
    held_out_of: Run | None = None


@dataclass(frozen=True)
class Comparison:
    """How far b is from a: KL(a || b) in nats per completion token of the reference answers. `over`: what the KL is summed over.

    `top1`: share of tokens with the same most likely token. `loss_a`, `loss_b`: mean nats per token. `identical`: number of rows with the same
    greedy answer. `parting`: median index (from 0) of the first different token in the other rows. `score`: both scores, and the points that
    b gains over a with a paired interval. `checks`: whether b's template, stop tokens ... match those of training.
    """

    a: str
    b: str
    on: str
    rows: int
    tokens: int
    over: str
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    loss_a: float
    loss_b: float
    identical: int
    parting: float | None
    metric: str
    score: dict[str, float]
    checks: tuple[contract.ContractCheck, ...] = ()
    unit: str = "tokens"  # what a position of a row is; of models with labels, what their distributions are over

    @property
    def perplexity_a(self) -> float:
        return math.exp(self.loss_a)

    @property
    def perplexity_b(self) -> float:
        return math.exp(self.loss_b)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_a": self.perplexity_a, "perplexity_b": self.perplexity_b}

    def enforce(self, limit: float) -> None:
        """Raise ParityFailed if the mean KL is above `limit`, or NaN."""
        if not self.kl_mean <= limit:
            raise ParityFailed(
                f"{self.b} is {self.kl_mean:.4g} nats per token from {self.a}; --max-kl allows {limit:g}"
            )


# --- what is compared -----------------------------------------------------------------------------------------------


def side(text: str) -> Side:
    """The model that an argument on the command line names.

    Raises:
        MissingArtifact: it names nothing that can be opened.
    """
    if text.startswith(("http://", "https://")):
        return Side(text, "vllm", url=root_url(text))
    path = Path(text)
    if (path / "recipe.yaml").is_file():
        run = Run.open(path)
        run.trained()
        return Side(text, "transformers", path, run=run)
    note = read_json(path / provenance.NOTE) if (path / provenance.NOTE).is_file() else {}
    if "format" in note:
        return Side(text, exporter(note["format"]).RUNTIME, path, export_format=note["format"], run=_maker(path))
    if (path / "config.json").is_file():
        return Side(text, "transformers", path, run=_maker(path))
    if (path / "adapter_config.json").is_file():
        raise MissingArtifact(
            f"{text}: an adapter cannot be compared without its base; pass the run directory that contains it"
        )
    raise MissingArtifact(f"{text}: not a run directory, a model folder, an export or the http:// URL of a server")


def _maker(path: Path) -> Run | None:
    """The run that contains a stage's folder: RUN/merge or RUN/export/NAME. None if there is none."""
    for root in (path.resolve().parent, path.resolve().parent.parent):
        if (root / "recipe.yaml").is_file() and (root / "run.json").is_file():
            return Run.open(root)
    return None


@contextmanager
def opened(which: Side, longest: int, head: ModelHead | None = None) -> Iterator[Any]:
    """Open a side for rows of at most `longest` tokens; closed on exit. `head`: of a folder that no run made; default: on every token."""
    with tempfile.TemporaryDirectory(prefix="qkit-") as folder, _open(which, longest, Path(folder), head) as runtime:
        yield runtime


def _open(which: Side, longest: int, scratch: Path, head: ModelHead | None) -> Any:
    if which.url:
        running = {"url": which.url, "model": served_name(which.url), "pid": os.getpid(), "startup_seconds": 0.0}
        return open_runtime("vllm", Path(), detect(), running=running)
    assert which.path is not None
    if which.is_reference and which.run is not None:
        recipe = which.run.recipe
        return open_runtime(
            "transformers",
            source.resolve(recipe.model),
            detect(),
            recipe=recipe,
            adapter=which.run.trained(),
        )
    if which.run is not None:
        return open_artifact(which.run, Artifact(which.export_format or MERGED, which.path), "verify")
    if head is not None:
        return open_runtime(which.runtime, which.path, detect(), head=head)
    serve = Serve(port=0, max_model_len=longest)
    return open_runtime(which.runtime, which.path, detect(), serve=serve, log=scratch / "vllm.log")


def served_name(url: str) -> str:
    """The name of the model that a server serves."""
    return str(contract.offered(url)["id"])


# --- the rows --------------------------------------------------------------------------------------------


def comparison_rows(a: Side, b: Side, data: Path | None, progress: Progress) -> ComparisonRows:
    """The rows to compare on: those of `data`, or the held-out rows of the run that a or b belongs to.

    Raises:
        DataError: there are no rows.
    """
    runs = [which.run for which in (a, b) if which.run is not None]
    if data is not None and data.suffix != ".parquet":
        return _of_lines(a, b, data, progress)
    run = runs[0] if runs and data is None else None
    if data is not None and (data.resolve().parent.parent / "recipe.yaml").is_file():
        run = Run.open(data.resolve().parent.parent)
    if run is None:
        raise DataError("no rows to compare on: set --data to a file of conversations or to RUN/data/test.parquet")
    file = data or run.need("data", "test.parquet")
    return _rows_of(file, run.recipe, f"{file}", None if data else run)


def _of_lines(a: Side, b: Side, data: Path, progress: Progress) -> ComparisonRows:
    """Conversations of a file, tokenized as in the data stage, with the tokenizer of the first side that has one."""
    from qkit.data.inspection import view

    local = next((which for which in (a, b) if which.path is not None), None)
    if local is None:
        raise DataError(
            f"--data {data}: cannot be tokenized, because both sides are servers; use RUN/data/test.parquet instead"
        )
    if local.run is not None:
        section = local.run.recipe.data.model_copy(
            update={"train": (Source(source=str(data)),), "validation": (), "test": (), "split": None}
        )
        recipe = local.run.recipe.model_copy(update={"data": section})
    else:
        recipe = view.recipe_for(str(local.path), str(data), "auto", ())
    inspection = view.inspect(recipe, progress)
    excluded = left_out(inspection.summary, "train")
    where = f"{data}; {excluded}" if excluded else str(data)
    return _rows_of(inspection.folder / "train.parquet", recipe, where, None)


def _rows_of(file: Path, recipe: Recipe, where: str, held_out_of: Run | None) -> ComparisonRows:
    held_out = measure_held_out.read_held_out(file, open_task(recipe.task))
    if not held_out.rows:
        raise DataError(f"{where}: contains no rows to compare on")
    stop = frozenset(read_json(file.with_name("tokens.json"))["stop"])
    return ComparisonRows(held_out, stop, recipe.task, recipe.evaluate, recipe.seed, where, held_out_of)


# --- comparing ------------------------------------------------------------------------------------------------------


def compare(a: Side, b: Side, chosen: ComparisonRows, progress: Progress) -> Comparison:
    """Score the rows and generate answers with a, then with b.

    Raises:
        ParityFailed: a or b returned NaN or infinite log-probabilities.
    """
    if not open_task(chosen.task).HEAD.generates:
        figures = _compare_labels.compare(a, b, chosen, opened, progress)
        return Comparison(a.name, b.name, chosen.where, **figures, metric=open_task(chosen.task).METRIC, checks=())
    rows = chosen.held_out.rows
    longest = max(len(row.input_ids) for row in rows) + chosen.section.max_new_tokens
    progress.notify(f"verify: {a.description}")
    with tempfile.TemporaryDirectory(prefix="qkit-") as folder:
        with opened(a, longest) as runtime:
            answers_a = _answers(a, runtime, chosen)
            scores_a = _stored(runtime.score(rows), Path(folder) / "a")
        progress.notify(f"verify: {b.description}")
        with opened(b, longest) as runtime:
            answers_b = _answers(b, runtime, chosen)
            distances = Distances(scores_a, open_task(chosen.task).distance)
            for row in runtime.score(rows[: len(scores_a)]):
                distances.add(row)
    return _comparison(a, b, chosen, answers_a, answers_b, distances)


def _answers(which: Side, runtime: Runtime, chosen: ComparisonRows) -> list[list[int]]:
    """Greedy answers. For a run's reference model on the run's held-out rows, they are read from its evaluation."""
    run = which.run if which.is_reference and chosen.held_out_of is which.run else None
    recorded = run is not None and open_task(run.recipe.task).ANSWERS_ARE_SCORED
    if run is not None and recorded and (run.folder("evaluate") / "predictions.jsonl").is_file():
        return [line["token_ids"] for line in evidence.reference_answers(run)]
    section, prompts = chosen.section, [row.prompt for row in chosen.held_out.rows]
    return runtime.generate(prompts, section.max_new_tokens, chosen.stop, section.batch_size)


def _stored(scores: Iterator[RowScores], file: Path) -> list[RowScores]:
    """Keep the scores for later. Scores over the whole vocabulary are stored on disk, as many rows as fit."""
    first = next(scores)
    if first.full is None:
        return [first, *scores]
    reference.write((row for part in ((first,), scores) for row in part), file)
    return list(reference.read(file))


def _comparison(
    a: Side,
    b: Side,
    chosen: ComparisonRows,
    answers_a: Sequence[Sequence[int]],
    answers_b: Sequence[Sequence[int]],
    distances: Distances,
) -> Comparison:
    """The figures of two sides, once all scores and answers are complete."""
    places = [first_difference(*pair) for pair in zip(answers_a, answers_b, strict=True)]
    different = [place for place in places if place is not None]
    return Comparison(
        a=a.name,
        b=b.name,
        on=chosen.where,
        **distances.figures(f"{a.name} or {b.name}"),
        loss_a=measure_scores.mean_loss(row.targets for row in distances.first),
        loss_b=measure_scores.mean_loss(distances.targets),
        identical=len(places) - len(different),
        parting=statistics.median(different) if different else None,
        metric=open_task(chosen.task).METRIC,
        score=_scores(a, b, chosen, answers_a, answers_b),
        checks=_checks(a, b),
    )


def _scores(
    a: Side, b: Side, chosen: ComparisonRows, answers_a: Sequence[Sequence[int]], answers_b: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Both scores in percent, and the difference with a paired interval; empty if answers are not scored, or nothing can decode them."""
    tokenizer, task = _tokenizer(a) or _tokenizer(b), open_task(chosen.task)
    if tokenizer is None or not task.ANSWERS_ARE_SCORED:
        return {}
    grades = [
        measure_scores.grade(
            tokenizer.batch_decode(answers, skip_special_tokens=True), chosen.held_out, task, chosen.section
        )
        for answers in (answers_a, answers_b)
    ]
    return {
        "a": measure_scores.percent(grades[0]),
        "b": measure_scores.percent(grades[1]),
        **measure_scores.paired_gain(grades[0], grades[1], chosen.section.confidence, chosen.seed),
    }


def _checks(a: Side, b: Side) -> tuple[contract.ContractCheck, ...]:
    """Check b against the serve contract of the run that a or b belongs to."""
    run = a.run or b.run
    if run is None or b.is_reference:
        return ()
    if b.url:
        return contract.check(run, b.url).checks
    has_config = b.path is not None and (b.path / "config.json").is_file()
    return contract.check_folder(run, b.path).checks if b.path and has_config else ()


def _tokenizer(which: Side) -> Any:
    if which.run is not None:
        return model_tokenizer.tokenizer_of(which.run.recipe.model)
    return None if which.path is None else model_tokenizer.load_tokenizer(which.path, _plain(which.path))


def _plain(folder: Path) -> Any:
    from qkit.recipe.schema import Model

    return Model(source=str(folder))
