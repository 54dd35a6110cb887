"""The notebooks in examples/ run completely, and show stored outputs."""

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def read(path: Path) -> Any:
    """The notebook, and its cells with code."""
    return pytest.importorskip("nbformat").read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cells: list[Any]) -> list[list[str]]:
    """What each cell shows: printed text, images, values."""
    shown = []
    for cell in cells:
        found = {output.get("name") or next(iter(sorted(output.get("data", {})))) for output in cell.outputs}
        shown.append(sorted(found - {"stderr"}))  # warnings and progress
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path: Path) -> None:
    """A reader on the web sees results: of all cells, in order, without errors, and small."""
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    images = [output for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(images) >= 2
    assert not any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 300_000
    printed = "".join(output.get("text", "") for output in outputs)
    assert not re.findall(r"(?<![\w.:])/(?!tmp/)\w+/\S+", printed)  # folders of the machine that ran it


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    """All cells run without an error, and show the same kinds of outputs as the stored ones."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read(path)
    stored = kinds(code_cells(notebook))
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    assert kinds(code_cells(notebook)) == stored
