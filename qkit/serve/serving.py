"""The stage `serve`, and `qkit serve`: a server on what a run has made, on any model folder, or on a model of the hub.

What is served is chosen, its memory planned, and the server started below a guard, watched, drained and ended.

serve/server.json   url, argv, start-up seconds. What it answers is checked by `verify`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, NotDeployable, ParityFailed, ServerError
from qkit.core.files import read_json
from qkit.core.sources import cache_dir, is_hub_id
from qkit.measure.artifacts import Artifact
from qkit.measure.evidence import FAILED, PASSED, Evidence, read_evidence
from qkit.model import source as model_source
from qkit.model.provenance import is_traced
from qkit.recipe.registry import MERGED
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.runtimes import vllm
from qkit.serve.fits import cache_bytes
from qkit.serve.request import Serving
from qkit.server import adapters
from qkit.server.lora import is_adapter

if TYPE_CHECKING:
    from qkit.serve.request import Asked


RUNTIMES = ("vllm", "onnxruntime")
UNVERIFIED = "unverified"  # by verify, as the files are now
# Options of the runtime that are not taken after `--`, and how qkit is told the same.
OWN = {
    "--host": "write --set serve.host=ADDRESS",
    "--port": "write --set serve.port=NUMBER",
    "--uds": "it asks its servers over TCP; write --set serve.port=NUMBER",
    "--api-key": "write --api-key-file FILE, or set VLLM_API_KEY: command lines can be read by everybody on the machine",
    "--model": "name the model as what is to be served",
    "--served-model-name": "write --name NAME",
}


def of_run(run: Run, asked: Asked) -> Serving:
    """The artifact of a run: the one that is asked for, else the best that passed its gate.

    Raises:
        MissingArtifact: the run has nothing for this runtime.
        NotDeployable: what it has is not served.
        ParityFailed: all that it has failed.
    """
    artifact, why = pick(run, asked)
    name = asked.name or run.root.resolve().name
    logs = (
        run.root / "logs" if os.access(run.root, os.W_OK) else cache_dir() / "logs"
    )  # it may be mounted to be read only
    made = Serving(
        str(artifact.path), name, run.recipe, detect(), logs, asked.runtime, vllm.Extras(), why, run, asked.contract
    )
    return _completed(made, asked)


def of_model(source: str, how: Recipe, asked: Asked) -> Serving:
    """Any model folder, or a model of the hub.

    Raises:
        ModelError: it is neither. NotDeployable: the runtime does not load it.
    """
    folder = Path(source)
    if asked.runtime == "onnxruntime":
        _need_genai(folder)
    needed = {"vllm": "config.json", "onnxruntime": "genai_config.json"}[asked.runtime]
    if folder.is_dir() and not (folder / needed).is_file():
        raise ModelError(
            f"{source}: holds no {needed}, so it is nothing that {asked.runtime} serves, nor a run directory"
        )
    if not folder.is_dir() and (asked.runtime != "vllm" or not is_hub_id(source)):
        raise ModelError(f"{source}: no such run directory or model folder; a model of the hub is written owner/name")
    if asked.runtime == "vllm" and folder.is_dir():
        _need_loader(folder)
    name = asked.name or (folder.resolve().name if folder.is_dir() else source)
    place, logs = str(folder.resolve()) if folder.is_dir() else source, cache_dir() / "logs"
    return _completed(Serving(place, name, how, detect(), logs, asked.runtime, vllm.Extras()), asked)


def _completed(made: Serving, asked: Asked) -> Serving:
    """With adapters checked against the model, and the cache's size."""
    refuse_own(asked.rest)
    if asked.runtime != "vllm" and (asked.adapters or asked.runtime_adapters):
        raise NotDeployable(f"--runtime {asked.runtime} serves no adapters apart from their base; serve the run itself")
    base = Path(made.model) if Path(made.model).is_dir() else None
    chosen = [adapters.parse(text) for text in asked.adapters]
    names = [made.name, *(name for name, _ in chosen)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServerError(f"--adapter: the name {', '.join(twice)} is given twice, or is the base's own")
    beside = _beside(made, chosen, base)
    extras = vllm.Extras(beside, asked.runtime_adapters, asked.key, cache_bytes(made.how), asked.rest)
    return replace(made, extras=extras)


def _beside(made: Serving, chosen: Sequence[tuple[str, Path]], base: Path | None) -> tuple[adapters.Adapter, ...]:
    """The adapters, each seen to belong to the base. A run's export has the run's own adapter in it, so those of others seldom do."""
    try:
        return tuple(adapters.checked(name, place, base) for name, place in chosen)
    except ModelError as error:
        if made.run is None:
            raise
        base_model = made.run.recipe.model
        source = base_model.source if is_hub_id(base_model.source) else model_source.resolve(base_model)
        words = " ".join(f"--adapter {name}={place}" for name, place in chosen)
        raise ModelError(
            f"{error}\nWhat {made.run.root} exports has its own adapter merged in; beside each other adapters go on their base: "
            f"`qkit serve {source} --adapter {made.name}={made.run.root} {words}`"
        ) from None


def refuse_own(rest: Sequence[str]) -> None:
    """Options that qkit gives the runtime itself: a second value would be obeyed by the runtime and by nothing around it.

    Raises:
        ServerError: there is one; the message says how qkit is told instead.
    """
    for word in rest:
        option = word.partition("=")[0].replace("_", "-")
        if said := [
            how for own, how in OWN.items() if len(option) > 2 and own.startswith(option)
        ]:  # vLLM takes `--hos` too
            raise ServerError(f"`-- {option}`: qkit gives this option itself, and counts on it; {said[0]}")


def pick(run: Run, asked: Asked) -> tuple[Artifact, str]:
    """Which artifact of a run a runtime serves, and a line on why."""
    found = [artifact for artifact in _made(run) if artifact.runtime == asked.runtime]
    if asked.artifact:
        found = [artifact for artifact in found if artifact.name == asked.artifact]
    else:  # the adapter apart is slower than what it was merged into: served where it is asked for, or nothing else is there
        found = [artifact for artifact in found if not is_adapter(artifact.path)] or found
    if not found:
        wanted = asked.artifact or {"vllm": "vllm", "onnxruntime": "onnx-fp32 or onnx-int4"}[asked.runtime]
        raise MissingArtifact(
            f"{run.root}: has no export {wanted} for --runtime {asked.runtime}: "
            f"name it in export.formats, then `qkit run {run.root}` makes it"
        )
    known = read_evidence(run.root)
    good = [artifact for artifact in found if asked.force or known.status(artifact.name) != FAILED]
    if not good:
        raise ParityFailed(
            f"{run.root}: {', '.join(artifact.name for artifact in found)} failed the gate, so it is not served; "
            f"`qkit show {run.root}` says by how much, --force serves it all the same"
        )
    best = max(good, key=lambda artifact: _merit(known, artifact, run.recipe.merge.choose))
    if asked.runtime == "onnxruntime":
        _need_genai(best.path)
    return (
        best,
        f"{best.name} ({known.status(best.name) or UNVERIFIED}, of {', '.join(artifact.name for artifact in found)})",
    )


def _need_loader(folder: Path) -> None:
    """Raise NotDeployable for weights quantized in a way that the installed vLLM does not load."""
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and vllm.methods() and method not in vllm.methods():
        raise NotDeployable(
            f"{folder}: its weights are quantized by {method}, which the installed vLLM does not load (it knows "
            f"{', '.join(sorted(vllm.methods()))}); serve a format made for it, such as vllm-w4a16"
        )


def _need_genai(folder: Path) -> None:
    """Raise NotDeployable for an ONNX graph that onnxruntime-genai's builder has not made."""
    if is_traced(folder):
        raise NotDeployable(
            f"{folder}: its graph was traced, since onnxruntime-genai's builder does not know the architecture, and onnxruntime-genai, "
            "which serves, opens only what its builder makes. ONNX Runtime itself opens it, as README.md there shows; "
            "to serve the model name vllm in export.formats"
        )


def _made(run: Run) -> list[Artifact]:
    """The exports of a run that are there and are whole models."""
    named = [Artifact(name, run.folder("export") / name) for name in run.recipe.export.formats if name != MERGED]
    signs = ("config.json", "genai_config.json", "adapter_config.json")
    return [a for a in named if any((a.path / file).is_file() for file in signs)]


def _merit(known: Evidence, artifact: Artifact, rule: str) -> tuple[bool, float, float]:
    """Passed before not judged; then the nearer to what was trained (a few points of a score are chance), or by `rule` the better score."""
    score = known.scores.get(artifact.name, {}).get("score", float("-inf"))
    nearness = -known.parity.get(artifact.name, {}).get("kl_mean", float("inf"))
    passed = known.status(artifact.name) == PASSED
    return (passed, score, nearness) if rule == "score" else (passed, nearness, score)
