"""The artifacts of a run (the merged model and the exports), and the runtime that opens each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.device import detect
from qkit.core.files import read_json
from qkit.measure.evidence import FAILED, merit, read_evidence
from qkit.merging.folder import dtype_of
from qkit.plugins.exporter import exporter
from qkit.plugins.runtime import open_runtime
from qkit.plugins.task import open_task
from qkit.recipe.registry import MERGED, is_unmerged, split
from qkit.run.directory import Run
from qkit.server.client import running_server

SERVED = "vllm"  # the export that the stage `serve` uses
# By variant, for formats whose config.json does not name the dtype: an ONNX graph defines its dtype; .gguf files are dequantized to fp32.
COMPUTED = {
    "fp32": "float32",
    "fp16": "float16",
    "int4": "float32",
    "int8": "float32",
    "f16": "float32",
    "q8_0": "float32",
    "q4_0": "float32",
}


@dataclass(frozen=True)
class Artifact:
    """The merged model or an export of a run. `name`: `merged`, or the export format."""

    name: str
    path: Path

    @property
    def runtime(self) -> str:
        return "transformers" if self.name == MERGED else exporter(self.name).RUNTIME

    @property
    def disk_bytes(self) -> int:
        """Size of all files; a link counts as its target."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


def rounding(run: Run, artifact: Artifact) -> dict[str, str]:
    """The dtypes of computation (`computed`) and of the merged weights (`weights`), as arguments of parity.measure."""
    variant, config = split(artifact.name)[1], artifact.path / "config.json"
    has_dtype = config.is_file() and artifact.runtime in ("transformers", "vllm")
    dtype = read_json(config).get("dtype") if has_dtype else None
    is_adapter = (artifact.path / "adapter_config.json").is_file()  # not merged, so no merged weight was rounded
    return {
        "computed": COMPUTED.get(variant, dtype or "bfloat16"),
        "weights": "float32" if is_adapter else dtype_of(run),
    }


def artifacts(run: Run) -> list[Artifact]:
    """The merged model, where there is one, then the exports in the recipe's order."""
    exports = [Artifact(name, run.need("export", name)) for name in run.recipe.export.formats]
    if is_unmerged(run.recipe):
        return exports
    return [Artifact(MERGED, run.need("merge", "config.json").parent), *exports]


def existing_exports(run: Run) -> list[Artifact]:
    """The exports of a run that exist."""
    named = [Artifact(name, run.folder("export") / name) for name in run.recipe.export.formats if name != MERGED]
    configs = ("config.json", "genai_config.json", "adapter_config.json")
    return [a for a in named if any((a.path / file).is_file() for file in configs)]


def best_export(run: Run, runtime: str) -> Artifact | None:
    """The export of a run for a runtime that passed its gate and is closest to the trained model; None if there is none."""
    evidence = read_evidence(run.root)
    exports = [artifact for artifact in existing_exports(run) if artifact.runtime == runtime]
    good = [artifact for artifact in exports if evidence.status(artifact.name) != FAILED]
    return max(good, key=lambda artifact: merit(evidence, artifact.name, run.recipe.merge.choose), default=None)


def open_artifact(run: Run, artifact: Artifact, stage: str) -> Any:
    """Open an artifact with its runtime. A server that `qkit run` already started for this run is reused."""
    options: dict[str, Any] = {"head": open_task(run.recipe.task).HEAD}
    if artifact.runtime == "vllm":
        serve = run.recipe.serve.model_copy(update={"port": 0})
        log = run.log(stage).with_name(f"{stage}-{artifact.name}.log")
        running = running_server(run) if artifact.name == SERVED else None
        options |= {"running": running, "serve": serve, "log": log, "served_name": run.root.name}
    return open_runtime(artifact.runtime, artifact.path, detect(), **options)
