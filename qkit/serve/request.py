"""What `qkit serve` is asked to do, and the server that this leads to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qkit.core.device import Device
from qkit.model.provenance import Purpose
from qkit.recipe.schema import Recipe, Serve
from qkit.run.directory import Run
from qkit.runtimes import vllm


@dataclass(frozen=True)
class ServeOptions:
    """The command line, apart from the target and its recipe.

    `name`: the model name in requests; None: the folder's name. `adapters`: each as NAME=RUN. `rest`: options for the runtime, none of them
    one that qkit sets itself. `force`: serve an artifact even if it failed its gate. `contract`: check, once the server answers, that it
    handles conversations, or texts with labels, as training did. `runtime`: None chooses by the model.
    """

    runtime: str | None = None
    artifact: str | None = None
    name: str | None = None
    adapters: tuple[str, ...] = ()
    runtime_adapters: bool = False
    key: str = field(default="", repr=False)
    rest: tuple[str, ...] = ()
    force: bool = False
    contract: bool = True


@dataclass(frozen=True)
class Serving:
    """A server that can be started. `model`: a folder or a hub id. `chosen`: which artifact of the run, and why; empty without a run.

    `purpose`: of a model with labels; None for one that generates text. `logs`: the folder for its log. Servers on one run, or on folders of
    the same name, may run at once, so the port is in the log's name.
    """

    model: str
    name: str
    recipe: Recipe
    device: Device
    logs: Path
    runtime: str
    extras: vllm.Extras
    chosen: str = ""
    run: Run | None = None
    contract: bool = True
    purpose: Purpose | None = None

    @property
    def section(self) -> Serve:
        return self.recipe.serve

    @property
    def log(self) -> Path:
        return self.logs / f"serve-{self.section.port}.log"

    @property
    def names(self) -> list[str]:
        """The model names that requests may give."""
        return [self.name, *(adapter.name for adapter in self.extras.adapters)]
