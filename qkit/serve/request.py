"""What `qkit serve` was asked for, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qkit.core.device import Device
from qkit.recipe.schema import Recipe
from qkit.run.directory import Run
from qkit.runtimes import vllm

# --- what is served -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line says beyond the target and its recipe. `adapters`: name=RUN. `force`: also what failed its gate.

    `name`: what requests give as `model`; None: the folder's name. `rest`: options for vLLM, none of them one that qkit gives itself.
    `contract`: whether the server is asked, once it answers, whether it does with conversations what training did.
    """

    runtime: str = "vllm"
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
    """A server that can be started. `model`: a folder or a hub id. `chosen`: which artifact, and why; empty for a foreign model.

    `logs`: the folder for its log. Servers on one run, or on folders of one name, may run at once, so a log is named for its port.
    """

    model: str
    name: str
    how: Recipe
    device: Device
    logs: Path
    runtime: str
    extras: vllm.Extras
    chosen: str = ""
    run: Run | None = None
    contract: bool = True

    @property
    def log(self) -> Path:
        return self.logs / f"serve-{self.how.serve.port}.log"

    @property
    def names(self) -> list[str]:
        """What a request may give as `model`."""
        return [self.name, *(adapter.name for adapter in self.extras.adapters)]
