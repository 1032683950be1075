"""Predicts every record of a file with a run, an artifact or a server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qkit.commands.predict import servers, sink, source
from qkit.commands.predict.predictors import ChatPredictor, LabelPredictor, Predictor
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, UserError, short
from qkit.core.files import read_json
from qkit.core.progress import Progress
from qkit.data.read import Broken, Record
from qkit.measure.artifacts import Artifact, artifacts, best_export, open_artifact
from qkit.model import tokenizer as model_tokenizer
from qkit.model.provenance import purpose_of
from qkit.plugins.example import RowError
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import Task, open_task
from qkit.recipe.registry import MERGED, TASKS, names
from qkit.recipe.schema import Evaluate, Model
from qkit.run.directory import Run
from qkit.server.client import Client, bearer

REQUEST_SECONDS = 600.0
FIRST_WINDOW = 128  # rows
SHORT_SECONDS, LONG_SECONDS = 2.0, 10.0  # of a window


@dataclass(frozen=True)
class Job:
    """What is predicted. `target`: a run, a folder or a URL. `columns`: ours -> the file's; `keep`: columns that are copied.

    `top_k`: how many labels are named; -1: all. `artifact`: of a run; None: the best that passed its gate. `key`: of a server.
    """

    target: str
    file: str
    out: str
    columns: Mapping[str, str]
    keep: Sequence[str] = ()
    stdin_format: str = "jsonl"
    top_k: int = -1
    max_new_tokens: int | None = None
    artifact: str | None = None
    model: str | None = None
    overwrite: bool = False
    key: str = ""


@dataclass(frozen=True)
class Result:
    """What became of the file. `rows`: predicted now; `errors`: of these, without an answer; `skipped`: there from an earlier attempt."""

    out: str
    model: str
    rows: int
    errors: int
    skipped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows_per_second": self.rows / self.seconds if self.seconds else 0.0}


def run(job: Job, progress: Progress) -> Result:
    """Predict all records and write their lines.

    Raises:
        UserError: the file, the target or an option is wrong, or the output is not of this file.
        ServerError: the server does not answer.
    """
    if job.top_k != -1 and Path(job.out).suffix in sink.DELIMITERS:
        raise UserError(f"--top-k {job.top_k}: a table has a column for each label; write JSON lines, or omit --top-k")
    records = source.records(job.file, job.stdin_format)
    written = sink.Sink(job.out, job.overwrite)
    try:
        _skip(records, written, job)
        with _opened(job, progress) as (name, task, predictor):
            begin = time.perf_counter()
            rows, errors = _predicted(records, written, job, task, predictor, progress)
        return Result(job.out, name, rows, errors, written.done, time.perf_counter() - begin)
    finally:
        written.close()


def _skip(records: Iterator[Record | Broken], written: sink.Sink, job: Job) -> None:
    """Pass over the records that have their lines.

    Raises:
        UserError: the lines are not of this file.
    """
    last = None
    for last in islice(records, written.done):  # noqa: B007 (the last one counts)
        pass
    if written.done and (last is None or last.line != written.last):
        raise UserError(
            f"{job.out}: it exists, and its {written.done} lines are not of {job.file}; name another file, or set --overwrite"
        )


def _predicted(
    records: Iterator[Record | Broken],
    written: sink.Sink,
    job: Job,
    task: Task,
    predictor: Predictor,
    progress: Progress,
) -> tuple[int, int]:
    """Predict window by window. Returns how many records there were, and how many of them have no answer."""
    rows = errors = 0
    begin = time.perf_counter()
    size = min(FIRST_WINDOW, predictor.window)
    with progress.bar("predict", None, written.done) as bar:
        while window := list(islice(records, size)):
            start = time.perf_counter()
            requests = [_request(record, job, task) for record in window]
            answers = iter(predictor.predict([one for one in requests if not isinstance(one, RowError)]))
            for record, request in zip(window, requests, strict=True):
                answer = request if isinstance(request, RowError) else next(answers)
                errors += isinstance(answer, RowError)
                line = {sink.ERROR: str(answer)} if isinstance(answer, RowError) else answer
                written.write(record.line, _kept(record, job), line)
            written.flush()
            rows += len(window)
            now = time.perf_counter()
            bar.advance(len(window), rows_per_second=rows / (now - begin))
            size = next_window(size, now - start, predictor.window)
    return rows, errors


def next_window(size: int, seconds: float, most: int) -> int:
    """The rows of the next window, after one of `size` rows took so long. Larger ones fill batches of one length better; what is lost when the
    command is stopped, and what is not shown, is one window.
    """
    if seconds < SHORT_SECONDS:
        return min(2 * size, most)
    return max(size // 2, 1) if seconds > LONG_SECONDS else size


def _request(record: Record | Broken, job: Job, task: Task) -> dict[str, Any] | RowError:
    if isinstance(record, Broken):
        return RowError(record.reason)
    try:
        return task.request(record.value, job.columns)
    except RowError as error:
        return error


def _kept(record: Record | Broken, job: Job) -> dict[str, Any]:
    value = {} if isinstance(record, Broken) else record.value
    return {name: value.get(name) for name in job.keep}


# --- the model --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(job: Job, progress: Progress) -> Iterator[tuple[str, Task, Predictor]]:
    """The model that a job names: its name, its task, and what predicts."""
    if job.target.startswith(("http://", "https://")):
        name, task, predictor = _of_server(job)
    elif (Path(job.target) / "recipe.yaml").is_file():
        name, task, predictor = _of_run(job, Run.open(Path(job.target)))
    else:
        name, task, predictor = _of_folder(job, Path(job.target))
    progress.notify(f"predicting with {name}")
    try:
        yield name, task, predictor
    finally:
        predictor.close()


def _check_options(job: Job, labelled: bool) -> None:
    """Refuse an option that this kind of model does not have.

    Raises:
        UserError: it would have no effect.
    """
    if labelled and job.max_new_tokens is not None:
        raise UserError("--max-new-tokens: no effect with labels; it is for models that generate text")
    if not labelled and job.top_k != -1:
        raise UserError("--top-k: no effect with a model that generates text; it is for labels")


def _of_server(job: Job) -> tuple[str, Task, Predictor]:
    client = Client(job.target, bearer(job.key or os.environ.get("OPENAI_API_KEY")), REQUEST_SECONDS)
    try:
        entry = client.entry(job.model)
        every = {name: open_task(name) for name in names(TASKS)}
        labelled = {name: task for name, task in every.items() if task.ENDPOINT}
        name = next(servers.endpoints(client, entry, labelled), None)
        model = str(entry["id"])
        _check_options(job, name is not None)
        if name is None:
            limit = job.max_new_tokens or Evaluate().max_new_tokens
            return f"{model} at {client.url}", every["chat"], servers.ChatServerPredictor(client, model, limit)
        options = _options(job, every[name])
        return (
            f"{model} at {client.url}",
            every[name],
            servers.LabelServerPredictor(client, model, every[name], options),
        )
    except BaseException:
        client.close()
        raise


def _options(job: Job, task: Task) -> dict[str, Any]:
    """The options of each request: an answer that leaves nothing out, but for --top-k."""
    return {**task.WHOLE, **({"top_k": job.top_k} if job.top_k != -1 else {})}


def _of_run(job: Job, run: Run) -> tuple[str, Task, Predictor]:
    task, name = open_task(run.recipe.task), run.root.name
    _check_options(job, not task.HEAD.generates)
    artifact = _artifact(job, run)
    runtime = open_artifact(run, artifact, "predict")
    title = f"{artifact.name} of {name}"
    if not task.HEAD.generates:
        service = task.service(artifact.path, run.recipe.data.max_length)
        assert service is not None, run.recipe.task
        return title, task, LabelPredictor(service, runtime, _options(job, task))
    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    tokenizer = model_tokenizer.tokenizer_of(run.recipe.model)
    section = run.recipe.evaluate
    limit = job.max_new_tokens or section.max_new_tokens
    return title, task, ChatPredictor(tokenizer, runtime, stop, limit, section.batch_size, run.recipe.data.system)


def _artifact(job: Job, run: Run) -> Artifact:
    """The artifact that the job names; else the best export that opens in this process, or the merged model."""
    made = {artifact.name: artifact for artifact in artifacts(run)}
    if job.artifact is None:
        return best_export(run, "onnxruntime") or made[MERGED]
    if job.artifact not in made:
        raise MissingArtifact(f"{run.root}: has no artifact {short(job.artifact)}; it has {', '.join(made)}")
    return made[job.artifact]


def _of_folder(job: Job, folder: Path) -> tuple[str, Task, Predictor]:
    """An artifact without its run: what it is for is in its qkit.json."""
    purpose = purpose_of(folder)
    if purpose is None:
        raise MissingArtifact(
            f"{folder}: not a run, and not an artifact that says what it is for (in qkit.json); give the run, or export it again"
        )
    if job.artifact is not None:
        raise UserError(f"--artifact {job.artifact}: no effect with {folder}, which is an artifact; give its run")
    task = open_task(purpose.task)
    _check_options(job, not task.HEAD.generates)
    runtime = open_runtime(
        "onnxruntime" if any(folder.glob("*.onnx")) else "transformers", folder, detect(), head=task.HEAD
    )
    service = task.service(folder, purpose.max_length)
    if service is not None:
        return str(folder), task, LabelPredictor(service, runtime, _options(job, task))
    tokenizer = model_tokenizer.load_tokenizer(folder, Model(source=str(folder)))
    limit = job.max_new_tokens or Evaluate().max_new_tokens
    return str(folder), task, ChatPredictor(tokenizer, runtime, _stops(folder), limit)


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, by the folder's generation config."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
