"""The files of a model folder other than its weights: which they are, and copying them.

This is the one place that knows. Downloads, merges, exports and cache keys all ask here.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".ot"),
        *(".onnx", ".data", ".ckpt", ".pkl", ".npz"),
    )
)
INDEX_SUFFIX = ".index.json"  # says which shard holds which tensor, so it belongs to the weights
TEXT_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")  # of files that are part of a model
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")  # most licences require a copy
HUB_PATTERNS = (*(f"*{suffix}" for suffix in TEXT_SUFFIXES), "tokenizer*", *LICENCES)
CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates")
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.tiktoken", "spiece.model"),
    *CHAT_TEMPLATES,
)
NOT_OF_THE_MODEL = frozenset({"README.md", "trainer_state.json"})


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or says where they are."""
    return file.suffix in WEIGHT_SUFFIXES or file.name.endswith(INDEX_SUFFIX)


def is_companion(file: Path) -> bool:
    """Whether a file belongs to the model and holds no weights."""
    return file.is_file() and file.name not in NOT_OF_THE_MODEL and not is_weights(file)


def copy_companions(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copy all files that a model folder needs besides its weights, except those named in `but`.

    These are the tokenizer, templates, generation config, remote code and licence. Weights of other frameworks and the optimizer state of a
    training checkpoint are left out. A subfolder is copied if it holds texts and no weights: named templates, modules of remote code.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir() and _is_part_of_model(path):
            (target / path.name).mkdir(exist_ok=True)
            copy_companions(path, target / path.name)
        elif is_companion(path) and path.name not in but:
            shutil.copyfile(path, target / path.name)


def _is_part_of_model(folder: Path) -> bool:
    if folder.name.startswith((".", "checkpoint", "__pycache__")):
        return False
    files = [file for file in folder.rglob("*") if file.is_file()]
    return any(file.suffix in TEXT_SUFFIXES for file in files) and not any(map(is_weights, files))


def tokenizer_files(folder: Path) -> set[Path]:
    """The files and folders of the tokenizer and its chat templates."""
    return set(_matching(folder, TOKENIZER_FILES))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a model folder, and nothing else: other files may describe another use of the base model."""
    for path in sorted(tokenizer_files(source)):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def text_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and template files, without the index of the weights."""
    return [file for file in _matching(folder, [f"*{suffix}" for suffix in TEXT_SUFFIXES]) if not is_weights(file)]


def _matching(folder: Path, patterns: Iterable[str]) -> Iterable[Path]:
    return (file for pattern in patterns for file in folder.glob(pattern))
