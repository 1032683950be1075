"""The rules of the code base, each with its guard."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qkit.pipeline import STAGES
from qkit.recipe import names

PACKAGE = Path(__file__).parent.parent / "qkit"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = [
    *("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "vllm"),
    *("onnx", "onnxruntime", "numpy", "pandas", "pyarrow", "matplotlib"),
]


def _imports(file: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"]])
def test_nothing_heavy_on_the_way_to_help(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['qkit', *sys.argv[1:]]\n"
        "from qkit.cli import main\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("file", MODULES, ids=lambda f: f.stem)
def test_heavy_imports_are_inside_functions(file: Path) -> None:
    heavy = {name for name in _imports(file, top_level_only=True) if name.split(".")[0] in HEAVY}
    assert not heavy


def test_stages_do_not_import_each_other() -> None:
    for name in STAGES:
        file = PACKAGE / f"{name}.py"
        file = file if file.exists() else PACKAGE / name / "__init__.py"
        others = {f"qkit.{other}" for other in STAGES if other != name}
        assert not others & _imports(file), name


@pytest.mark.parametrize("folder", ["export", "runtimes", "tasks"])
def test_plugins_import_neither_each_other_nor_a_stage(folder: str) -> None:
    stages = {f"qkit.{stage}" for stage in STAGES}
    for name in names(folder):
        found = _imports(PACKAGE / folder / f"{name}.py")
        siblings = {f"qkit.{folder}.{other}" for other in names(folder) if other != name}
        assert not found & (siblings | stages), name


def test_only_the_command_line_prints_or_exits() -> None:
    allowed = {"cli.py", "bootstrap.py", "child.py"}  # the last two are programs of their own
    for file in MODULES:
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert file.name in allowed or not calls & {"print", "exit", "input"}, file


def test_only_device_knows_cuda_from_cpu() -> None:
    for file in MODULES:
        if file.name not in {"device.py", "bootstrap.py", "doctor.py"}:
            assert not re.search(r"cuda\.is_available|kind == \"(cuda|cpu)\"", file.read_text(encoding="utf-8")), file


def test_vllm_is_never_imported() -> None:
    for file in MODULES:
        assert not any(name.split(".")[0] == "vllm" for name in _imports(file)), file


def test_no_module_is_called_utils() -> None:
    assert not [file for file in MODULES if file.stem in {"utils", "util", "helpers", "common", "misc"}]
