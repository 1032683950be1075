"""The rules of the code base that no linter checks, each with its guard. Who may import whom is a contract of import-linter (`make lint`)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import paths
from helpers.paths import PACKAGE, ROOT

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
        "from qkit.cli.app import main\n"
        "try: main()\n"
        f"finally: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


STANDALONE = PACKAGE / "model" / "pooled_head.py"  # a copy of it lies beside models, for plain transformers


def test_heavy_imports_are_inside_functions() -> None:
    heavy = {
        str(file): found
        for file in MODULES
        if file != STANDALONE
        and (found := {name for name in _imports(file, top_level_only=True) if name.split(".")[0] in HEAVY})
    }
    assert not heavy


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/figures.py", "from qkit.report import summary"),  # a ground that looks up
        ("train/label_sums.py", "from qkit.data import ledger"),  # a stage that imports another
        ("export/formats/bnb.py", "from qkit.export import stage"),  # a format that imports the stage
        ("runtimes/vllm.py", "from qkit.runtimes import transformers"),  # one runtime from another
        ("model/shape.py", "from qkit.model import config"),  # a circle
    ],
)
def test_a_wrong_import_fails(module: str, line: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "qkit", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "qkit" / module
    file.write_text(file.read_text(encoding="utf-8") + f"\n\ndef _wrong() -> None:\n    {line}\n", encoding="utf-8")
    done = _lint_imports(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_the_contract_holds() -> None:
    done = _lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rooms_are_small_enough_to_see_at_once() -> None:
    for folder in {file.parent for file in MODULES}:
        shown = [path for path in folder.iterdir() if path.suffix == ".py" and not path.name.startswith("_")]
        shown += [path for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
        if folder == PACKAGE:
            assert len([path for path in shown if path.is_file()]) <= 6
        else:
            assert len([path for path in shown if not path.name.startswith("_")]) <= 14, folder
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert docstring, folder


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 40, node.name


def test_only_the_command_line_prints_or_exits() -> None:
    allowed = {"bootstrap.py", "process.py"}  # programs of their own
    for file in MODULES:
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert (
            "cli" in file.relative_to(PACKAGE).parts or file.name in allowed or not calls & {"print", "exit", "input"}
        ), file


def test_only_device_knows_cuda_from_cpu() -> None:
    told = r"cuda\.is_available|\.kind [!=]= \"|\.meter [!=]= \"|kind == \"(cuda|cpu)\"|meter == \"(rss|cuda)"
    for file in MODULES:
        if file.name not in {"device.py", "bootstrap.py", "doctor.py", "memory_meter.py"}:
            assert not re.search(told, file.read_text(encoding="utf-8")), file


def test_vllm_is_never_imported() -> None:
    programs = {"vllm_driver.py"}  # run by vLLM's own interpreter, imported by nothing
    for file in MODULES:
        assert file.name in programs or not any(name.split(".")[0] == "vllm" for name in _imports(file)), file


TESTS = sorted(paths.TESTS.rglob("*.py"))


def test_no_test_module_imports_another() -> None:
    """What several use is in tests/helpers; and conftest is pytest's own to load, once."""
    for file in TESTS:
        parts = {part for name in _imports(file) for part in name.split(".")}
        assert not {part for part in parts if part.startswith("test_") or part in ("conftest", "tests")}, file


def test_tests_are_where_their_package_is() -> None:
    """And each has a name of its own: pytest imports them by it."""
    names = [file.name for file in TESTS if file.name.startswith("test_")]
    assert len(names) == len(set(names))
    folders = {file.relative_to(paths.TESTS).parts[0] for file in TESTS if file.parent != paths.TESTS} - {"helpers"}
    assert not [folder for folder in folders if not (PACKAGE / folder / "__init__.py").exists()]


def test_no_module_is_called_utils() -> None:
    assert not [file for file in MODULES if file.stem in {"utils", "util", "helpers", "common", "misc"}]
