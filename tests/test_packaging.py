"""What ships, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 needs tomli to read pyproject.toml")

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def package_folders() -> Iterator[str]:
    for marker in sorted(ROOT.rglob("__init__.py")):
        parts = marker.parent.relative_to(ROOT).parts
        if not (set(parts) & NOT_SHIPPED or any(part.startswith(".") for part in parts)):
            yield ".".join(("tensorsleuth", *parts))


def modules(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from folder_of(package).rglob("*.py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever in the file; relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    assert sorted(PACKAGES) == sorted(package_folders())


@pytest.mark.parametrize("module", ["tensorsleuth", "tensorsleuth.store"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "matplotlib")
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.anchor)
    assert shown.stdout.strip() == "[]"


def test_store_and_analyze_never_import_torch_or_transformers() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("tensorsleuth.store", "tensorsleuth.analyze")
        for line, name in imports(path)
        if name.split(".")[0] in {"torch", "transformers"}
    ]
    assert found == []


def test_imports_inside_the_package_are_relative() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in PACKAGES
        for path in folder_of(package).glob("*.py")
        for line, name in imports(path)
        if name.split(".")[0] == "tensorsleuth"
    ]
    assert found == []


def test_a_wheel_holds_every_package_the_sql_files_and_the_type_marker(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel here needs setuptools >= 77")
    source = tmp_path / "source"
    copytree(ROOT, source, ignore=ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests", "demo"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tensorsleuth-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    expected = {
        "tensorsleuth/" + path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.sql")
        for path in folder_of(package).glob(pattern)
    }
    assert expected - shipped == set()
    assert "tensorsleuth/py.typed" in shipped
    assert "tensorsleuth/porting/lint/releases.json.xz" in shipped
    assert "tensorsleuth/references/norms.md" in shipped
    assert "tensorsleuth/examples/tiny-llama/config.json" in shipped
    assert not any(name.startswith(("tensorsleuth/tests", "tensorsleuth/benchmarks", "tests/")) for name in shipped)
