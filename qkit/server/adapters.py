"""LoRA adapters on a served base model: checked before vLLM loads them; listed, loaded and unloaded while the server runs.

vLLM accepts an adapter of another base silently, and its answers are worse. So its fingerprint is compared with the base's here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.core.errors import MissingArtifact, ServerError
from qkit.core.files import read_json
from qkit.model.provenance import check_adapter
from qkit.server.client import Client, bearer
from qkit.server.lora import rank_for

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
LOAD_SECONDS = 300.0  # timeout of a request that loads an adapter


@dataclass(frozen=True)
class Adapter:
    """An adapter for vLLM. `rank`: the --max-lora-rank that it needs, one of lora.RANKS."""

    name: str
    path: Path
    rank: int


def parse(text: str) -> tuple[str, Path]:
    """The name and the path in `name=RUN`, or in `name=FOLDER` for the folder of an adapter.

    Raises:
        ServerError: the text does not have this form.
    """
    name, separator, place = text.partition("=")
    if not (separator and place and NAME.fullmatch(name)):
        raise ServerError(f"--adapter {text}: must be name=RUN, with a name of letters, digits, `_`, `.` and `-`")
    return name, Path(place)


def folder_of(place: Path) -> Path:
    """The folder of a run's adapter, or `place` itself.

    Raises:
        MissingArtifact: it does not contain an adapter.
    """
    folder = place / "train" / "adapter" if (place / "recipe.yaml").is_file() else place
    if not (folder / "adapter_config.json").is_file():
        raise MissingArtifact(f"{folder}: adapter_config.json is missing; `qkit train {place}` makes an adapter")
    return folder.resolve()


def checked(name: str, place: Path, base: Path | None) -> Adapter:
    """The adapter, after checks that it belongs to `base` and that vLLM serves it. `base`: None if it is not on this disk.

    Raises:
        MissingArtifact: there is no adapter, or qkit did not make it.
        ModelError: it was trained on other weights.
        NotDeployable: vLLM does not serve adapters of its kind.
    """
    folder = folder_of(place)
    if base is not None:
        check_adapter(folder, base)
    return Adapter(name, folder, rank_for(read_json(folder / "adapter_config.json")))


# --- at a running server ------------------------------------------------------------------------------------------------


class Endpoint:
    """The adapters of the vLLM server at `url`.

    Raises, from each method:
        ServerError: the server does not answer, or refuses; its answer is in the message.
    """

    def __init__(self, url: str, key: str = ""):
        self.url, self.headers = url, bearer(key)

    def list(self) -> Sequence[Mapping[str, Any]]:
        """Models by name; an adapter has its base as `parent`, and its folder as `root`."""
        with self._client() as client:
            return [{key: model.get(key) for key in ("id", "parent", "root")} for model in client.models()]

    def load(self, name: str, place: Path) -> Adapter:
        """Load an adapter, after the checks that are possible here: against the base too, where its folder is on this disk."""
        base = next((Path(model["root"]) for model in self.list() if not model["parent"] and model["root"]), None)
        adapter = checked(name, place, base if base and base.is_dir() else None)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.path)})
        return adapter

    def unload(self, name: str) -> None:
        """Remove an adapter from the server."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _client(self) -> Client:
        return Client(self.url, self.headers, LOAD_SECONDS)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        with self._client() as client:
            answer = client.send("POST", path, body)
            if answer.status_code == 404 and "Not Found" in answer.text:
                raise ServerError(
                    f"{client.url}: this server does not load adapters at run time; start it with `qkit serve ... --runtime-adapters`",
                    url=client.url,
                    status=404,
                )
            client.expect_ok(answer)
