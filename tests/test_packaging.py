"""Packaging tests: wheel and source archive are complete and small; their metadata is correct."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import dcris

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source archive."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_package_and_nothing_else(packages: Path) -> None:
    """The wheel holds exactly the package's files, among them the tiny encoders. A clone would hide
    a missing one."""
    (wheel,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(REPOSITORY / "src")) for path in (REPOSITORY / "src/dcris").rglob("*") if path.is_file()
    }
    sources = {name for name in sources if "__pycache__" not in name}
    packaged = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert packaged == sources
    assert "dcris/py.typed" in packaged
    assert wheel.stat().st_size < 25_000_000


def test_the_source_archive_builds_the_same_wheel(packages: Path, tmp_path: Path) -> None:
    """A wheel built from the source archive has the same content, as distributions build from
    that."""
    (source,) = packages.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (again,), (wheel,) = (tmp_path / "dist").glob("*.whl"), packages.glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert {item.filename: item.CRC for item in one.infolist()} == {
            item.filename: item.CRC for item in other.infolist()
        }


def test_version_pythons_and_extras(packages: Path) -> None:
    """Command, module and metadata agree on the version; Python 3.11 to 3.13 may install it; all
    extras are documented."""
    (wheel,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    assert f"Version: {dcris.__version__}\n" in text
    assert "Requires-Python: >=3.11\n" in text
    for python in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {python}\n" in text
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", text, re.M))
    assert {"data", "dev", "docs", "export", "tensorboard", "video", "wandb", "web"} <= extras
    table = re.findall(r"^\| (`.+?) \|", (REPOSITORY / "docs/install.md").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == extras
    done = subprocess.run([sys.executable, "-m", "dcris", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"dcris {dcris.__version__}\n"


def test_citation_file() -> None:
    """CITATION.cff has the fields that its format requires, this version, and both papers."""
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dcris.__version__
    assert [reference["year"] for reference in citation["references"]] == [2024, 2025]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert all({"family-names", "given-names"} <= author.keys() for author in reference["authors"])
