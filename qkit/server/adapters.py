"""LoRA adapters beside a served base model: checked before vLLM sees them, listed, loaded and unloaded while it runs.

vLLM takes an adapter of another base without a word and answers worse; so its fingerprint is compared with the base's here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core import network
from qkit.core.errors import MissingArtifact, ServerError
from qkit.core.files import read_json
from qkit.core.network import ADDRESS, reaching
from qkit.model.provenance import check_adapter
from qkit.server.lora import rank_for

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Adapter:
    """An adapter as vLLM is given it. `rank`: the room it needs, one of served_adapter.RANKS."""

    name: str
    path: Path
    rank: int


def parse(text: str) -> tuple[str, Path]:
    """`name=RUN`, or `name=FOLDER` of an adapter.

    Raises:
        ServerError: it is not written so.
    """
    name, separator, place = text.partition("=")
    if not (separator and place and NAME.fullmatch(name)):
        raise ServerError(f"--adapter {text}: write it as name=RUN, the name of letters, digits, `_`, `.` and `-`")
    return name, Path(place)


def folder_of(place: Path) -> Path:
    """The adapter of a run, or the folder itself.

    Raises:
        MissingArtifact: there is none.
    """
    found = place / "train" / "adapter" if (place / "recipe.yaml").is_file() else place
    if not (found / "adapter_config.json").is_file():
        raise MissingArtifact(f"{found}: holds no adapter_config.json; `qkit train {place}` makes an adapter")
    return found.resolve()


def checked(name: str, place: Path, base: Path | None) -> Adapter:
    """The adapter, seen to belong to `base` and to be one that vLLM serves. `base` None: it is not on this disk, and is not compared.

    Raises:
        MissingArtifact: there is no adapter, or it is not one of qkit's.
        ModelError: it was trained on other weights.
        NotDeployable: vLLM does not serve its kind.
    """
    folder = folder_of(place)
    if base is not None:
        check_adapter(folder, base)
    return Adapter(name, folder, rank_for(read_json(folder / "adapter_config.json")))


# --- while it runs ----------------------------------------------------------------------------------------------------


class Endpoint:
    """The adapters of a running vLLM server.

    Raises, by each method:
        ServerError: it does not answer, or refuses; what it said is in the message.
    """

    def __init__(self, url: str, key: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def list(self) -> Sequence[Mapping[str, Any]]:
        """Models by name; an adapter has its base as `parent`, and its folder as `root`."""
        answer = self._ask("GET", "/v1/models")
        with reaching(ServerError, f"{self.url}/v1/models gives no list of models", ADDRESS):
            models = network.models(answer.json())
        return [{key: model.get(key) for key in ("id", "parent", "root")} for model in models]

    def load(self, name: str, place: Path) -> Adapter:
        """Load an adapter, after the checks that can be made from here: the base's too, where its folder is on this disk."""
        base = next((Path(model["root"]) for model in self.list() if not model["parent"] and model["root"]), None)
        adapter = checked(name, place, base if base and base.is_dir() else None)
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.path)})
        return adapter

    def unload(self, name: str) -> None:
        """Take an adapter out."""
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        import httpx

        with reaching(ServerError, f"{self.url} does not answer", ADDRESS):
            answer = httpx.request(method, f"{self.url}{path}", json=body, headers=self.headers, timeout=300.0)
        if answer.status_code == 404 and path.endswith("lora_adapter") and "Not Found" in answer.text:
            raise ServerError(
                f"{self.url}: loading adapters is off there; start it with `qkit serve ... --runtime-adapters`"
            )
        if answer.status_code != 200:
            raise ServerError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:500]}")
        return answer
