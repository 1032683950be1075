"""The model that a job names: a run's artifact, an artifact's folder, or a server's; known before it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qkit.commands.predict import servers
from qkit.commands.predict.job import Job
from qkit.commands.predict.predictors import ChatPredictor, LabelPredictor, Predictor
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, UserError, short
from qkit.core.files import read_json
from qkit.measure.artifacts import Artifact, artifacts, best_export, existing_exports, open_artifact
from qkit.measure.evidence import read_evidence
from qkit.model import tokenizer as model_tokenizer
from qkit.model.provenance import Purpose, purpose_of
from qkit.plugins.example import NO_MORE
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import Task, open_task
from qkit.recipe.registry import MERGED, TASKS, names
from qkit.recipe.schema import Data, Evaluate, Model
from qkit.run.directory import Run
from qkit.server.client import Client, bearer

REQUEST_SECONDS = 600.0


@dataclass(frozen=True)
class Target:
    """A model that is not open yet. `place`: its run, folder or URL; `weights`: what tells it from others of this name.

    `options`: what its answers depend on, besides; `columns`: of the recipe it was trained by, ours -> the data's.
    """

    name: str
    place: str
    weights: str
    task: Task
    options: Mapping[str, Any]
    open: Callable[[], Predictor]
    columns: Mapping[str, str] = field(default_factory=dict)


def resolve(job: Job) -> Target:
    """The model that a job names.

    Raises:
        UserError: there is none, or an option has no effect with it.
        ServerError: the server does not answer.
    """
    if job.target.startswith(("http://", "https://")):
        return _of_server(job)
    if (Path(job.target) / "recipe.yaml").is_file():
        return _of_run(job, Run.open(Path(job.target)))
    return _of_folder(job, Path(job.target))


def check_options(job: Job, task: Task) -> None:
    """Refuse an option that a task does not have.

    Raises:
        UserError: it would have no effect.
    """
    if not task.HEAD.generates and job.max_new_tokens is not None:
        raise UserError("--max-new-tokens: no effect with labels; it is for models that generate text")
    if task.HEAD.generates and job.top_k != -1:
        raise UserError("--top-k: no effect with a model that generates text; it is for labels")
    for ours, theirs in job.columns.items():
        if wrong := task.unknown_column(Data.model_construct(columns={ours: theirs}), NO_MORE):
            raise UserError(wrong.replace("data.columns maps", "--column maps", 1))


def _of_server(job: Job) -> Target:
    connect = partial(Client, job.target, bearer(job.key or os.environ.get("OPENAI_API_KEY")), REQUEST_SECONDS)
    every = {name: open_task(name) for name in names(TASKS)}
    with connect() as client:
        entry = client.entry(job.model)
        labelled = {name: task for name, task in every.items() if task.ENDPOINT}
        name = next(servers.endpoints(client, entry, labelled), None)
    model, task = str(entry["id"]), every[name or "chat"]
    check_options(job, task)
    options = _options(job, task, Evaluate())

    def opened() -> Predictor:
        if name is None:
            return servers.ChatServerPredictor(connect(), model, options["max_new_tokens"])
        return servers.LabelServerPredictor(connect(), model, task, options)

    return Target(f"{model} at {client.url}", client.url, model, task, options, opened)


def _options(job: Job, task: Task, section: Evaluate) -> dict[str, Any]:
    """The options of each request: an answer that leaves nothing out, but for --top-k; or the tokens that are generated at most."""
    if task.HEAD.generates:
        return {"max_new_tokens": job.max_new_tokens or section.max_new_tokens}
    return {**task.WHOLE, **({"top_k": job.top_k} if job.top_k != -1 else {})}


def _of_run(job: Job, run: Run) -> Target:
    recipe, task = run.recipe, open_task(run.recipe.task)
    check_options(job, task)
    artifact = _artifact(job, run)
    options = _options(job, task, recipe.evaluate)

    def opened() -> Predictor:
        runtime = open_artifact(run, artifact, "predict")
        if not task.HEAD.generates:
            service = task.service(artifact.path, recipe.data.max_length)
            assert service is not None, recipe.task
            return LabelPredictor(service, runtime, options)
        stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
        tokenizer = model_tokenizer.tokenizer_of(recipe.model)
        limit, size = options["max_new_tokens"], recipe.evaluate.batch_size
        return ChatPredictor(tokenizer, runtime, stop, limit, size, recipe.data.system)

    name, place = f"{artifact.name} of {run.root.name}", str(run.root.resolve())
    return Target(name, place, _recorded(run, artifact), task, options, opened, recipe.data.columns)


def _artifact(job: Job, run: Run) -> Artifact:
    """The artifact that the job names; else the best export that opens in this process, or the merged model.

    Raises:
        MissingArtifact: there is none.
    """
    by_name = {artifact.name: artifact for artifact in artifacts(run)}
    chosen = by_name.get(job.artifact) if job.artifact else best_export(run, "onnxruntime") or by_name.get(MERGED)
    if chosen is not None:
        return chosen
    if job.artifact:
        raise MissingArtifact(f"{run.root}: has no artifact {short(job.artifact)}; it has {', '.join(by_name)}")
    evidence = read_evidence(run.root)
    exports = [
        f"{one.name} ({one.runtime}; {evidence.status(one.name) or 'not verified'})" for one in existing_exports(run)
    ]
    raise MissingArtifact(
        f"{run.root}: no export for onnxruntime passed its gate, and method={run.recipe.method} makes no merged model; its exports are "
        f"{', '.join(exports) or '(none)'}: add onnx-fp32 to export.formats and run it again, or name one with --artifact",
        path=run.folder("export"),
    )


def _of_folder(job: Job, folder: Path) -> Target:
    """An artifact without its run: what it is for is in its qkit.json."""
    purpose = purpose_of(folder)
    if purpose is None:
        raise MissingArtifact(
            f"{folder}: not a run, and not an artifact that says what it is for (in qkit.json); give the run, or export it again"
        )
    if job.artifact is not None:
        raise UserError(f"--artifact {job.artifact}: no effect with {folder}, which is an artifact; give its run")
    task = open_task(purpose.task)
    check_options(job, task)
    options = _options(job, task, Evaluate())
    opened = partial(_open_folder, folder, purpose, task, options)
    return Target(str(folder), str(folder.resolve()), _of_files(folder), task, options, opened)


def _open_folder(folder: Path, purpose: Purpose, task: Task, options: Mapping[str, Any]) -> Predictor:
    runtime = open_runtime(
        "onnxruntime" if any(folder.glob("*.onnx")) else "transformers", folder, detect(), head=task.HEAD
    )
    service = task.service(folder, purpose.max_length)
    if service is not None:
        return LabelPredictor(service, runtime, options)
    tokenizer = model_tokenizer.load_tokenizer(folder, Model(source=str(folder)))
    return ChatPredictor(tokenizer, runtime, _stops(folder), options["max_new_tokens"])


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, by the folder's generation config."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


# --- what tells weights apart -------------------------------------------------------------------------------------------


def _recorded(run: Run, artifact: Artifact) -> str:
    """A hash of the hashes that the run records of an artifact's files; of the files' sizes and times if it has none."""
    stage, folder = ("merge", "merge/") if artifact.name == MERGED else ("export", f"export/{artifact.name}/")
    hashes = sorted((name, digest) for name, digest in run.outputs(stage).items() if name.startswith(folder))
    return _digest(hashes) if hashes else _of_files(artifact.path)


def _of_files(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files: it is quick, and a file that is written again changes it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return _digest([(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
