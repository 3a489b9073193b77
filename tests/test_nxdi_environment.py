"""What `port env` finds: sources, placeholders, and what to do about what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorsleuth.cli.app import main
from tensorsleuth.porting.environment import NXD, NXDI, find_environment, require_sources
from tensorsleuth.porting.readiness import check_readiness
from tensorsleuth.store.errors import InputError


def make_package(folder: Path, name: str, version: str) -> Path:
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text(f'__version__ = "{version}"\n')
    return package


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    make_package(tmp_path / "a" / "src", NXDI, "0.9.0")
    make_package(tmp_path / "b", NXD, "0.18.0")
    return {"NXDI_SRC": str(tmp_path / "a"), "NXD_SRC": str(tmp_path / "b")}


def make_placeholder(site: Path, distribution: str) -> None:
    package = site / distribution.replace("-", "_")
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError\n")
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n\nWRONG PACKAGE.\n")
    (info / "RECORD").write_text(f"{package.name}/__init__.py,,\n")


def test_sources_are_found_in_a_checkout_or_the_folder_itself(sources: dict[str, str], tmp_path: Path) -> None:
    found = find_environment(sources)
    assert found.nxdi is not None
    assert found.nxd is not None
    assert (found.nxdi.version, found.nxd.version) == ("0.9.0", "0.18.0")
    again = find_environment({**sources, "NXD_SRC": str(tmp_path / "b" / NXD)})
    assert again.nxd == found.nxd


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"NXDI_SRC=.* holds no package neuronx_distributed_inference"):
        find_environment({"NXDI_SRC": str(tmp_path)})


def test_missing_sources_name_the_variables() -> None:
    with pytest.raises(InputError, match="set NXDI_SRC and NXD_SRC"):
        require_sources(find_environment({}))


def test_a_placeholder_is_refused(sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    make_placeholder(site, "torch-neuronx")
    monkeypatch.syspath_prepend(str(site))
    found = find_environment(sources)
    assert found.placeholders == ("torch-neuronx",)
    assert not found.has_sdk
    with pytest.raises(InputError, match="torch-neuronx from PyPI is an empty placeholder"):
        require_sources(found)


def test_port_env_without_sources_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NXDI_SRC", raising=False)
    monkeypatch.delenv("NXD_SRC", raising=False)
    assert main(["port", "env"]) == 2
    printed = capsys.readouterr().out
    assert "FAILED:neuronx_distributed_inference" in printed
    assert "RESOLVED:" not in printed
    assert main(["port", "env", "--dry-run"]) == 4


def test_capture_without_sources_is_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("NXDI_SRC", raising=False)
    monkeypatch.delenv("NXD_SRC", raising=False)
    assert main(["capture", "nxdi", str(tmp_path / "t"), "model", "--run", "a", "--port", "p.py:P", "--cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NXDI_SRC" in error
    assert not (tmp_path / "t").exists()


def test_packages_that_import_are_resolved(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in sources.items():
        monkeypatch.setenv(name, value)
    report = check_readiness(importer=lambda name, activated: None)
    assert report.exit_code == 0
    resolved = [line for line in report.lines() if line.startswith("RESOLVED:")]
    assert [line.split("=")[0] for line in resolved] == [
        "RESOLVED:NXDI_SRC",
        "RESOLVED:NXD_SRC",
        "RESOLVED:TRANSFORMERS_SRC",
    ]


def test_packages_that_do_not_import_are_runtime_errors(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sources.items():
        monkeypatch.setenv(name, value)
    report = check_readiness(importer=lambda name, activated: "GLIBC_2.99 not found" if name == NXD else None)
    assert report.exit_code == 5
    assert "RUNTIME_ERROR:neuronx_distributed" in report.lines()
    assert not any(line.startswith("RESOLVED:") for line in report.lines())


def test_a_device_needs_the_sdk_and_its_system_packages(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sources.items():
        monkeypatch.setenv(name, value)
    report = check_readiness(device=True, importer=lambda name, activated: None)
    assert report.exit_code == 2
    assert {"torch_neuronx", "aws-neuronx-dkms"} <= set(report.failed)
