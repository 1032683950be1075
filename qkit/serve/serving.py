"""What `qkit serve` serves: an artifact of a run, any model folder, or a model of the hub; with adapters, or not at all.

A model that generates text goes to vLLM unless another runtime is named; a model with labels goes to ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qkit.core.device import detect
from qkit.core.errors import MissingArtifact, ModelError, NotDeployable, ParityFailed, ServerError
from qkit.core.files import read_json
from qkit.core.sources import cache_dir, is_hub_id
from qkit.measure.artifacts import Artifact, existing_exports
from qkit.measure.evidence import FAILED, merit, read_evidence
from qkit.model import source as model_source
from qkit.model.provenance import Purpose, is_traced, purpose_of
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.runtimes import vllm
from qkit.serve.fits import cache_bytes
from qkit.serve.request import ServeOptions, Serving
from qkit.server import adapters
from qkit.server.lora import is_adapter

RUNTIMES = DEFAULT_RUNTIME, LABELLED_RUNTIME = ("vllm", "onnxruntime")
GRAPH = "model.onnx"  # of a model with labels
POOLING = (
    "--runner",
    "pooling",
    "--dtype",
    "float32",
)  # in vLLM's own choice, a model trained in fp32 would be served in 16 bits
UNVERIFIED = "unverified"  # verify has not judged the files that are there now
CONFIGS = {"vllm": "config.json", "onnxruntime": "genai_config.json"}  # what a folder for the runtime must contain
# Options of the runtime that qkit sets itself, and how the user sets them through qkit.
RESERVED_OPTIONS = {
    "--host": "use --set serve.host=ADDRESS",
    "--port": "use --set serve.port=NUMBER",
    "--uds": "qkit reaches its servers over TCP; use --set serve.port=NUMBER",
    "--api-key": "use --api-key-file FILE, or set VLLM_API_KEY: everybody on the machine can read command lines",
    "--model": "give the model as the target of `qkit serve`",
    "--served-model-name": "use --name NAME",
}


def of_run(run: Run, options: ServeOptions) -> Serving:
    """A server for an artifact of a run: the one that the options name, otherwise the best one that passed its gate.

    Raises:
        MissingArtifact: the run has no artifact for this runtime.
        NotDeployable: the artifact, or an adapter, cannot be served.
        ParityFailed: every artifact for this runtime failed its gate.
    """
    purpose = _purpose_of_run(run)
    options = _with_runtime(options, purpose)
    artifact, why = pick(run, options)
    name = options.name or run.root.resolve().name
    check_options(options, name)
    writable = os.access(run.root, os.W_OK)  # a run may be mounted read-only
    return Serving(
        model=str(artifact.path),
        name=name,
        recipe=_with_length(run.recipe, purpose),
        device=detect(),
        logs=run.root / "logs" if writable else cache_dir() / "logs",
        runtime=str(options.runtime),
        extras=_extras(options, artifact.path, run.recipe, name, run, purpose),
        chosen=why,
        run=run,
        contract=options.contract,
        purpose=purpose,
    )


def of_model(source: str, recipe: Recipe, options: ServeOptions) -> Serving:
    """A server for a model folder, or for a model of the hub.

    Raises:
        ModelError: the source is neither.
        NotDeployable: the runtime cannot load it, or an adapter cannot be served.
    """
    folder = Path(source)
    purpose = purpose_of(folder)
    purpose = purpose if purpose and not open_task(purpose.task).HEAD.generates else None
    options = _with_runtime(options, purpose)
    _check_model(folder, source, str(options.runtime), purpose)
    is_folder = folder.is_dir()
    name = options.name or (folder.resolve().name if is_folder else source)
    check_options(options, name)
    return Serving(
        model=str(folder.resolve()) if is_folder else source,
        name=name,
        recipe=_with_length(recipe, purpose),
        device=detect(),
        logs=cache_dir() / "logs",
        runtime=str(options.runtime),
        extras=_extras(options, folder.resolve() if is_folder else None, recipe, name, None, purpose),
        purpose=purpose,
    )


def _purpose_of_run(run: Run) -> Purpose | None:
    """What a run's model is for, if it has labels."""
    recipe = run.recipe
    return None if open_task(recipe.task).HEAD.generates else Purpose(recipe.task, recipe.data.max_length)


def _with_runtime(options: ServeOptions, purpose: Purpose | None) -> ServeOptions:
    """The options with a runtime, and with what vLLM has to be told of a model with labels.

    Raises:
        NotDeployable: adapters are to be served of a model with labels.
    """
    if purpose is not None and (options.adapters or options.runtime_adapters):
        raise NotDeployable(f"a server for task={purpose.task} does not serve adapters; serve the run itself")
    runtime = options.runtime or (DEFAULT_RUNTIME if purpose is None else LABELLED_RUNTIME)
    rest = (*POOLING, *options.rest) if purpose is not None and runtime == "vllm" else options.rest
    return replace(options, runtime=runtime, rest=rest)


def _with_length(recipe: Recipe, purpose: Purpose | None) -> Recipe:
    """The recipe with the length of training as the server's, for a model with labels: the default may exceed its positions."""
    if purpose is None:
        return recipe
    section = recipe.serve.model_copy(update={"max_model_len": purpose.max_length})
    return recipe.model_copy(update={"serve": section})


def _check_model(folder: Path, source: str, runtime: str, purpose: Purpose | None) -> None:
    """Raise ModelError or NotDeployable if the runtime cannot serve this source."""
    if purpose is not None and runtime != "vllm":
        if not (folder / GRAPH).is_file():
            raise ModelError(f"{source}: {GRAPH} is missing: serve the run, or its export onnx-fp32 or onnx-int8")
        return
    if runtime == "onnxruntime":
        _need_genai(folder)
    if not folder.is_dir() and (runtime != "vllm" or not is_hub_id(source)):
        raise ModelError(f"{source}: no such run directory or model folder; a model of the hub has the form owner/name")
    if folder.is_dir() and not (folder / CONFIGS[runtime]).is_file():
        raise ModelError(
            f"{source}: {CONFIGS[runtime]} is missing, so this is neither a run directory nor a model for {runtime}"
        )
    if folder.is_dir() and runtime == "vllm":
        _need_loader(folder)


# --- options and adapters -----------------------------------------------------------------------------------------------


def check_options(options: ServeOptions, name: str) -> None:
    """Check the options that do not depend on the model.

    Raises:
        ServerError: an option for the runtime is one that qkit sets itself, or a name is given twice.
        NotDeployable: the runtime does not serve adapters.
    """
    refuse_reserved(options.rest)
    if options.runtime not in (None, "vllm") and (options.adapters or options.runtime_adapters):
        raise NotDeployable(f"--runtime {options.runtime} does not serve adapters; serve the run itself")
    names = [name, *(adapter for adapter, _ in map(adapters.parse, options.adapters))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ServerError(f"--adapter: the name {', '.join(twice)} is given twice, or is the name of the model")


def refuse_reserved(rest: Sequence[str]) -> None:
    """Refuse options that qkit sets itself: the runtime would follow a second value, but qkit would not know it.

    Raises:
        ServerError: there is one. The message says how to set it through qkit.
    """
    for argument in rest:
        option = argument.partition("=")[0].replace("_", "-")
        # vLLM accepts abbreviations such as `--hos`
        reserved = next((name for name in RESERVED_OPTIONS if len(option) > 2 and name.startswith(option)), None)
        if reserved:
            raise ServerError(f"`-- {option}`: qkit sets this option itself; {RESERVED_OPTIONS[reserved]}")


def _extras(
    options: ServeOptions, base: Path | None, recipe: Recipe, name: str, run: Run | None, purpose: Purpose | None
) -> vllm.Extras:
    """`base`: the folder of the model, where it is on this disk: adapters are checked against it."""
    chosen = [adapters.parse(text) for text in options.adapters]
    try:
        checked = tuple(adapters.checked(adapter, place, base) for adapter, place in chosen)
    except ModelError as error:
        if run is None:
            raise
        raise ModelError(f"{error}\n{_serve_the_base(run, name, options.adapters)}") from None
    return vllm.Extras(
        checked, options.runtime_adapters, options.key, 0 if purpose else cache_bytes(recipe), options.rest
    )


def _serve_the_base(run: Run, name: str, adapter_options: Sequence[str]) -> str:
    """What to do instead of serving a run's export with adapters of other runs: the export contains the run's own adapter."""
    base = run.recipe.model
    source = base.source if is_hub_id(base.source) else model_source.resolve(base)
    others = " ".join(f"--adapter {option}" for option in adapter_options)
    return (
        f"The exports of {run.root} have its own adapter merged in. To serve several adapters, serve their base: "
        f"`qkit serve {source} --adapter {name}={run.root} {others}`"
    )


# --- the artifact of a run ----------------------------------------------------------------------------------------------


def pick(run: Run, options: ServeOptions) -> tuple[Artifact, str]:
    """The artifact of a run that the runtime serves, and a line that says why."""
    candidates = _candidates(run, options)
    evidence = read_evidence(run.root)
    good = [artifact for artifact in candidates if options.force or evidence.status(artifact.name) != FAILED]
    if not good:
        raise ParityFailed(
            f"{run.root}: {', '.join(artifact.name for artifact in candidates)} failed the gate and will not be served; "
            f"`qkit show {run.root}` says by how much, --force serves it anyway"
        )
    runtime = options.runtime or DEFAULT_RUNTIME
    best = max(good, key=lambda artifact: merit(evidence, artifact.name, run.recipe.merge.choose))
    if runtime == "onnxruntime" and open_task(run.recipe.task).HEAD.generates:
        _need_genai(best.path)
    return (
        best,
        f"{best.name} ({evidence.status(best.name) or UNVERIFIED}, of {', '.join(artifact.name for artifact in candidates)})",
    )


def _candidates(run: Run, options: ServeOptions) -> list[Artifact]:
    """The exports for the runtime. A separate adapter is slower than a merged model, so it is only served on request, or if it is the only one.

    Raises:
        MissingArtifact: there are none.
    """
    runtime = options.runtime or DEFAULT_RUNTIME
    has_labels = not open_task(run.recipe.task).HEAD.generates
    if (
        has_labels and runtime == "vllm" and options.artifact in (None, MERGED)
    ):  # it has no export of its own: the merged model is one
        return [Artifact(MERGED, run.need("merge", "config.json").parent)]
    artifacts = [artifact for artifact in existing_exports(run) if artifact.runtime == runtime]
    if options.artifact:
        artifacts = [artifact for artifact in artifacts if artifact.name == options.artifact]
    else:
        artifacts = [artifact for artifact in artifacts if not is_adapter(artifact.path)] or artifacts
    if not artifacts:
        low = "int8" if has_labels else "int4"
        wanted = options.artifact or {"vllm": "vllm", "onnxruntime": f"onnx-fp32 or onnx-{low}"}[runtime]
        raise MissingArtifact(
            f"{run.root}: has no export {wanted} for --runtime {runtime}; "
            f"add it to export.formats, then `qkit run {run.root}` makes it"
        )
    return artifacts


def _need_loader(folder: Path) -> None:
    """Raise NotDeployable if the installed vLLM cannot load the quantization of the weights."""
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and vllm.methods() and method not in vllm.methods():
        raise NotDeployable(
            f"{folder}: the weights are quantized by {method}, which the installed vLLM does not load (it loads "
            f"{', '.join(sorted(vllm.methods()))}); serve a format made for it, such as vllm-w4a16"
        )


def _need_genai(folder: Path) -> None:
    """Raise NotDeployable for an ONNX graph that was not made by onnxruntime-genai's builder."""
    if is_traced(folder):
        raise NotDeployable(
            f"{folder}: onnxruntime-genai, which runs the server, opens only graphs of its own builder. This graph was traced, because the "
            "builder does not know the architecture. ONNX Runtime itself opens it, as README.md in the folder shows; "
            "to serve the model, add vllm to export.formats"
        )
