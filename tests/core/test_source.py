from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qkit.core import sources
from qkit.core.errors import DataError, DoesNotFit, ModelError
from qkit.core.sources import HubId, locate
from qkit.model import source
from qkit.recipe import schema

TEXT = "pypi:some-data==1.0!some_data/rows.jsonl"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds its wheels here: the real pip, and no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some_data-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_data/rows.jsonl", '{"a": 1}\n')
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("QKIT_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_file_in_a_package(wheels: Path) -> None:
    found = locate(TEXT)
    assert isinstance(found, Path) and found.read_text() == '{"a": 1}\n'
    next(wheels.iterdir()).unlink()
    assert locate(TEXT) == found  # from the cache


def test_two_that_fetch_the_same_at_once(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process gets all the way while this one is half-way."""
    copy = sources.shutil.copyfileobj

    def late(reading: Any, writing: Any) -> None:
        code = f"from qkit.core.sources import locate; print(locate({TEXT!r}).read_text())"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == '{"a": 1}'
        copy(reading, writing)

    monkeypatch.setattr(sources.shutil, "copyfileobj", late)
    found = locate(TEXT)
    assert isinstance(found, Path) and found.read_text() == '{"a": 1}\n'
    assert [file.name for file in found.parent.iterdir()] == [found.name]


def test_its_sha256_is_checked(wheels: Path) -> None:
    digest = hashlib.sha256(next(wheels.iterdir()).read_bytes()).hexdigest()
    locate(TEXT, sha256=digest)
    with pytest.raises(DataError, match=f"sha256 .* is {digest}, but the recipe says {'0' * 64}"):
        locate(TEXT, sha256="0" * 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pypi:some-data==1.0!some_data/other", "does not contain some_data/other"),
        ("pypi:some-data==1.0!../../x", "points outside the package"),
        ("pypi:some-data", "write it as pypi:"),
        ("pypi:none-such==1.0!x", "pip could not download none-such==1.0"),
        ("./none.jsonl", "no such file or folder"),
    ],
)
def test_what_is_not_there(wheels: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(text, kind=ModelError)


def test_no_disk_space(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "ERROR: [Errno 28] No space left on device")

    monkeypatch.setattr(sources.subprocess, "run", full)
    with pytest.raises(DoesNotFit, match="QKIT_CACHE"):
        locate(TEXT)


def test_hub_ids_and_paths(tmp_path: Path) -> None:
    assert locate("Qwen/Qwen2.5-7B-Instruct") == HubId("Qwen/Qwen2.5-7B-Instruct")
    assert locate(str(tmp_path)) == tmp_path


def test_a_model_of_the_hub_is_fetched_once_and_with_its_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's repositories hold the weights twice, Llama's beside them the original ones."""
    import huggingface_hub

    files = [
        "config.json",
        "LICENSE",
        "USE_POLICY.md",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin"]
    asked: list[str] = []

    def download(_: str, allow_patterns: list[str], **__: object) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    source.resolve(schema.Model(source="owner/name"))
    assert list(huggingface_hub.utils.filter_repo_objects([*files, *others], allow_patterns=asked)) == files


@pytest.mark.parametrize("text", ["x" * 100_000, '{"text": "' + "x" * 5000 + '"}', "owner/" + "x" * 5000 + "!"])
def test_a_text_that_is_no_name_is_given_back_short(text: str) -> None:
    with pytest.raises(DataError) as caught:
        locate(text)
    assert "no such file or folder" in str(caught.value) and len(str(caught.value)) < 500
