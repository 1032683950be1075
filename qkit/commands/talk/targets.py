"""Opens whom a job names: a run's artifact, a model's folder, or a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.commands.talk.job import Job
from qkit.commands.talk.servers import Remote
from qkit.commands.talk.speakers import Local, Speaker, parameters
from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, UserError, short
from qkit.core.files import read_json
from qkit.core.sources import is_hub_id
from qkit.measure.artifacts import Artifact, best_export, existing_exports, open_artifact
from qkit.measure.evidence import read_evidence
from qkit.model import source as model_source
from qkit.model import tokenizer as model_tokenizer
from qkit.model.provenance import purpose_of
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED, task_has_labels
from qkit.recipe.schema import Model, Serve
from qkit.run.directory import Run
from qkit.server.client import Client, bearer

REQUEST_SECONDS = 600.0
BASE = "base"  # what can answer beside an adapter
UNVERIFIED = "not verified"
# In the names of architectures whose answers are no text.
LABELLED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
STOP_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Talk:
    """Who answers. `title`: what is talked to, in a line; `speakers`: by name, in the order in which they answer; the last is the target.

    `system`: the first system turn.
    """

    title: str
    speakers: Mapping[str, Speaker]
    system: str | None = None

    def close(self) -> None:
        """Release the models."""
        for speaker in self.speakers.values():
            speaker.close()


def opened(job: Job) -> Talk:
    """Open what a job names.

    Raises:
        UserError: there is no such model, it gives no text, or an option has no effect with it.
        ServerError: the server does not answer.
    """
    parameters(job.sampling)
    if job.target.startswith(("http://", "https://")):
        return _of_server(job)
    if (Path(job.target) / "recipe.yaml").is_file():
        return _of_run(job, Run.open(Path(job.target)))
    return _of_folder(job)


def _refuse_labels(what: str, target: str) -> UserError:
    return UserError(
        f"{what} gives labels, not text: `qkit predict {target} FILE --out OUT.jsonl` predicts the rows of a file"
    )


# --- a server ---------------------------------------------------------------------------------------------------------


def _of_server(job: Job) -> Talk:
    client = Client(job.target, bearer(job.key or os.environ.get("OPENAI_API_KEY")), REQUEST_SECONDS)
    entry = client.entry(job.model)
    if task_has_labels(str(entry.get("task"))):
        raise _refuse_labels(f"{entry['id']} at {client.url}", job.target)
    speakers = {str(entry["id"]): Remote(client, str(entry["id"]), job.sampling)}
    if job.beside is not None:
        beside = _beside(client, entry, job.beside)
        speakers = {beside: Remote(client, beside, job.sampling), **speakers}
    return Talk(
        f"{entry['id']} at {client.url}; template, stop tokens and defaults are the server's", speakers, job.system
    )


def _beside(client: Client, entry: Mapping[str, Any], name: str) -> str:
    """The name of the server's model that answers beside another: one that it lists, or the base of an adapter.

    Raises:
        UserError: there is none.
    """
    listed = [str(one["id"]) for one in client.models()]
    parent = entry.get("parent")
    chosen = parent if name == BASE and name not in listed and parent else name
    if chosen not in listed or chosen == entry["id"]:
        others = ", ".join(one for one in listed if one != entry["id"]) or "nothing else"
        raise UserError(
            f"--beside {short(name)}: beside {entry['id']}, {client.url} serves {others}; `qkit serve BASE --adapter NAME=RUN` serves both"
        )
    return str(chosen)


# --- a run ------------------------------------------------------------------------------------------------------------


def _of_run(job: Job, run: Run) -> Talk:
    recipe = run.recipe
    if not open_task(recipe.task).HEAD.generates:
        raise _refuse_labels(f"{run.root}: a model of task={recipe.task}", str(run.root))
    if job.beside is not None:
        return _beside_base(job, run)
    artifact, why = chosen_artifact(run, job.artifact)
    if artifact.runtime == "vllm":
        raise UserError(
            f"{artifact.name} of {run.root} is for vLLM: start `qkit serve {run.root} --artifact {artifact.name}`, then "
            "`qkit chat http://127.0.0.1:8000`"
        )
    if artifact.name == recipe.trained_as:
        runtime, defaults = _reference(run), model_source.companions(recipe.model)
    else:
        runtime, defaults = open_artifact(run, artifact, "chat"), artifact.path
    speaker = _local(job, run, runtime, defaults)
    return Talk(
        f"{artifact.name} of {run.root} ({why}) with {artifact.runtime}", {artifact.name: speaker}, _system(job, run)
    )


def chosen_artifact(run: Run, name: str | None) -> tuple[Artifact, str]:
    """The artifact of that name, or the best that opens in this process; and why.

    In order: the best ONNX export that did not fail its gate, the merged model, what was trained.

    Raises:
        MissingArtifact: there is none.
    """
    status = read_evidence(run.root).status
    there = _existing(run)
    best = best_export(run, "onnxruntime")
    names = [name] if name else [*([best.name] if best else []), MERGED, run.recipe.trained_as]
    chosen = next((there[one] for one in names if one in there), None)
    if chosen is None and name:
        raise MissingArtifact(f"{run.root}: has no artifact {short(name)}; it has {', '.join(there) or 'none yet'}")
    if chosen is None:
        raise MissingArtifact(
            f"{run.root}: nothing is trained yet: `qkit run {run.root}` continues it", path=run.folder("train")
        )
    kind = "named" if name else "the best here"
    return chosen, f"{kind}, {status(chosen.name) or UNVERIFIED}"


def _existing(run: Run) -> dict[str, Artifact]:
    """What a run has by now, by name: exports, the merged model, what was trained."""
    every = {one.name: one for one in existing_exports(run)}
    if (run.folder("merge") / "config.json").is_file():
        every[MERGED] = Artifact(MERGED, run.folder("merge"))
    for folder in ("adapter", "model"):
        if (path := run.folder("train") / folder).is_dir():
            every[run.recipe.trained_as] = Trained(run.recipe.trained_as, path)
    return every


@dataclass(frozen=True)
class Trained(Artifact):
    """What was trained, as it was trained: no export."""

    @property
    def runtime(self) -> str:
        return "transformers"


def _reference(run: Run) -> Any:
    folder = model_source.resolve(run.recipe.model)
    return open_runtime("transformers", folder, detect(), recipe=run.recipe, adapter=run.trained())


def _beside_base(job: Job, run: Run) -> Talk:
    """The adapter on its base, and the base: one model in memory.

    Raises:
        UserError: the run has no adapter that can be turned off, or something else is to answer beside it.
    """
    from qkit.runtimes._continued import has_adapter

    if job.beside != BASE:
        raise UserError(
            f"--beside {short(job.beside)}: beside a run only `base` answers; with the URL of a server, any of its models"
        )
    if job.artifact not in (None, run.recipe.trained_as):
        raise UserError(f"--artifact {job.artifact}: no effect with --beside base, which turns the adapter on and off")
    run.trained()
    runtime = _reference(run)
    if not has_adapter(runtime):
        runtime.close()
        raise UserError(
            f"{run.root}: --beside base turns an adapter off, and method={run.recipe.method} left none that can be; talk to "
            f"{run.recipe.model.source} in a second terminal"
        )
    defaults, name = model_source.companions(run.recipe.model), run.recipe.trained_as
    speakers = {
        BASE: _local(job, run, runtime, defaults, without_adapter=True),
        name: _local(job, run, runtime, defaults, closes=False),
    }
    return Talk(f"{name} of {run.root} on its base, and the base alone, with transformers", speakers, _system(job, run))


def _local(
    job: Job, run: Run, runtime: Any, defaults: Path, without_adapter: bool = False, closes: bool = True
) -> Local:
    """`defaults`: the folder whose generation_config.json counts; `closes`: closing the speaker closes the runtime."""
    from qkit.runtimes._continued import continued
    from qkit.server.onnx_requests import model_defaults

    stop = frozenset(read_json(run.need("data", "tokens.json"))["stop"])
    return Local(
        model_tokenizer.tokenizer_of(run.recipe.model),
        continued(runtime, without_adapter),
        stop,
        run.recipe.serve.max_model_len,
        job.sampling,
        model_defaults(defaults),
        runtime.close if closes else lambda: None,
    )


def _system(job: Job, run: Run) -> str | None:
    """The system turn: --system, or the one that training put in front of conversations without their own."""
    return job.system if job.system is not None else run.recipe.data.system


# --- a folder ---------------------------------------------------------------------------------------------------------


def _of_folder(job: Job) -> Talk:
    from qkit.runtimes._continued import continued
    from qkit.server.onnx_requests import model_defaults

    for option, value in {"--artifact": job.artifact, "--beside": job.beside}.items():
        if value is not None:
            raise UserError(f"{option} {short(value)}: no effect with {job.target}, which is not a run")
    folder = _folder(job.target)
    section = Model(source=str(folder))
    runtime_name = "onnxruntime" if any(folder.glob("*.onnx")) else "transformers"
    tokenizer = _tokenizer(folder, section, job.target)
    runtime = open_runtime(runtime_name, folder, detect(), head=open_task("chat").HEAD)
    limit = min(Serve().max_model_len, model_tokenizer.max_positions(section) or Serve().max_model_len)
    stop = _stops(folder) | frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    speaker = Local(
        tokenizer, continued(runtime), stop, limit, job.sampling, model_defaults(folder), runtime.close
    )  # fmt: skip
    return Talk(f"{job.target} with {runtime_name}", {folder.name: speaker}, job.system)


def _folder(target: str) -> Path:
    """The folder of a model: itself, or that of a .gguf file or a hub id.

    Raises:
        UserError: it holds no model, or one that gives no text.
    """
    path = Path(target).expanduser()
    if not path.exists() and not is_hub_id(target):
        raise MissingArtifact(
            f"{short(target)}: no such run or folder; a server is a URL, such as http://127.0.0.1:8000"
        )
    folder = path if path.is_dir() else model_source.resolve(Model(source=target))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{target}: an adapter without its base; give its run, or merge it with `qkit merge`", source=folder
        )
    if not any((folder / name).is_file() for name in ("config.json", "genai_config.json")):
        raise ModelError(
            f"{target}: neither a run directory nor a model's folder (config.json is missing)", source=folder
        )
    purpose = purpose_of(folder)
    if (purpose and task_has_labels(purpose.task)) or _has_label_head(folder):
        raise _refuse_labels(f"{target}: its model", target)
    return folder


def _has_label_head(folder: Path) -> bool:
    config = folder / "config.json"
    names = (read_json(config).get("architectures") or ()) if config.is_file() else ()
    return any(word in name for name in names for word in LABELLED)


def _tokenizer(folder: Path, section: Model, target: str) -> Any:
    from qkit.model.added_tokens import bare_tokenizer

    if not bare_tokenizer(folder, section.trust_remote_code).chat_template:
        raise ModelError(
            f"{target}: this model has no chat template: use its instruct version, or train it with "
            f"model.chat_template=chatml; `qkit serve {target}` continues texts, and `qkit predict` is for models with labels",
            source=folder,
        )
    return model_tokenizer.load_tokenizer(folder, section)


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end an answer, by the folder's configs."""
    files = [folder / name for name in STOP_FILES if (folder / name).is_file()]
    ids = (model_tokenizer.token_ids(read_json(file), "eos_token_id", file) for file in files)
    return frozenset(next((some for some in ids if some), []))
