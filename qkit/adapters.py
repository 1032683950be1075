"""LoRA adapters beside a served base model: checked before vLLM sees them, listed, loaded and unloaded while it runs.

vLLM takes an adapter of another base without a word and answers worse; so its fingerprint is compared with the base's here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import MissingArtifact, NotDeployable, ServerError
from qkit.model import check_adapter
from qkit.run import read_json

RANKS = (
    1,
    8,
    16,
    32,
    64,
    128,
    256,
    320,
    512,
)  # what vLLM has kernels for; another rank is served in the room of the next
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "tok_embeddings"}
)  # all linear layers are served; of embeddings no rows are
UNSERVED = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "target_parameters",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as vLLM is given it. `rank`: the room it needs, one of RANKS."""

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
    config: Mapping[str, Any] = read_json(folder / "adapter_config.json")
    if wrong := unserved(config):
        raise NotDeployable(
            f"{name}: vLLM does not serve this adapter: {'; '.join(wrong)}. Serve the merged model instead"
        )
    return Adapter(name, folder, room(_highest_rank(config)))


def unserved(config: Mapping[str, Any]) -> list[str]:
    """What in an adapter_config.json vLLM does not serve."""
    wrong = [f"it has {key}" for key in UNSERVED if config.get(key)]
    rank, targets = _highest_rank(config), config.get("target_modules") or []
    if rank > RANKS[-1]:
        wrong.append(f"its rank is {rank}, the highest is {RANKS[-1]}")
    names = [] if isinstance(targets, str) else [str(target).rpartition(".")[2] for target in targets]
    if embedded := sorted(EMBEDDINGS.intersection(names)):
        wrong.append(f"it adapts {', '.join(embedded)}, and only linear layers are served")
    return wrong


def _highest_rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def room(rank: int) -> int:
    """The smallest --max-lora-rank that an adapter fits into."""
    return next((known for known in RANKS if known >= rank), RANKS[-1])


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
        models: list[dict[str, Any]] = self._ask("GET", "/v1/models").json()["data"]
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

        try:
            answer = httpx.request(method, f"{self.url}{path}", json=body, headers=self.headers, timeout=300.0)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url} does not answer: {error}") from None
        if answer.status_code == 404 and path.endswith("lora_adapter") and "Not Found" in answer.text:
            raise ServerError(
                f"{self.url}: loading adapters is off there; start it with `qkit serve ... --runtime-adapters`"
            )
        if answer.status_code != 200:
            raise ServerError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:500]}")
        return answer
