"""The header of a .gguf file. Read by hand, so that `qkit plan` needs no numpy."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkit.core.errors import ModelError

# Value types of GGUF's metadata: struct letter by type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"


def gguf_config(file: Path) -> dict[str, Any]:
    """The config.json that a .gguf header amounts to.

    Raises:
        ModelError: the header is damaged or truncated.
    """
    try:
        return _as_config(*read_gguf(file))
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(
            f"{file}: its GGUF header is damaged or truncated ({error!r}); download it again", source=file
        ) from None


def read_gguf(file: Path, arrays: str = "") -> tuple[dict[str, Any], set[str]]:
    """Metadata of a .gguf file and the names of its tensors. An array is given by its length, or whole if its key begins with `arrays`."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"{file}: is not a GGUF file (it does not begin with GGUF)", source=file)
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
            if version not in (2, 3):
                raise ModelError(
                    f"{file}: is GGUF version {version}; only versions 2 and 3 are supported, convert it again",
                    source=file,
                )
            reader = _Reader(data, 24)
            metadata = dict(reader.entry(arrays) for _ in range(key_count))
            return metadata, set(reader.tensor_names(tensor_count))


class _Reader:
    """Reads a little-endian GGUF header from front to back."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data = data
        self.at = at

    def scalar(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def entry(self, arrays: str) -> tuple[str, Any]:
        key, kind = self.text(), self.scalar("I")
        if kind == ARRAY and arrays and key.startswith(arrays):
            inner, count = self.scalar("I"), self.scalar("Q")
            return key, [self.value(inner) for _ in range(count)]
        return key, self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._skip_array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(SCALARS[kind])

    def _skip_array(self, kind: int, count: int) -> int:
        """Skip an array. Vocabularies hold 10^5 strings, hence the bare loop."""
        if kind != STRING:
            self.at += count * struct.calcsize(f"<{SCALARS[kind]}")
            return count
        at, unpack, data = self.at, struct.Struct("<Q").unpack_from, self.data
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at
        return count

    def tensor_names(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.text()
            dimensions = self.scalar("I")
            self.at += 8 * dimensions + 4 + 8  # sizes, type, offset
            if self.at > len(self.data):
                raise ValueError("the list of tensors ends early")


def _as_config(metadata: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    """The metadata with the names of a config.json. What the metadata lacks is read from the tensors' names."""
    kind = metadata["general.architecture"]
    config = {
        "model_type": kind,
        "hidden_size": metadata.get(f"{kind}.embedding_length"),
        "intermediate_size": metadata.get(f"{kind}.feed_forward_length"),
        "num_hidden_layers": metadata.get(f"{kind}.block_count"),
        "num_attention_heads": metadata.get(f"{kind}.attention.head_count"),
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv"),
        "head_dim": metadata.get(f"{kind}.attention.key_length"),
        "vocab_size": metadata.get(TOKENS, metadata.get(f"{kind}.vocab_size")),
        "num_experts": metadata.get(f"{kind}.expert_count"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    return {key: value for key, value in config.items() if value is not None}
