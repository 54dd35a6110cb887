"""The notebook in examples/ runs completely."""

import shutil
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/segment.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(
    trained_run: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells run without an error."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    shutil.copytree(scenes_root, run / "scenes")
    monkeypatch.setenv("DCRIS_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "outputs are not kept in git"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert "score" in cells[1].outputs[0]["text"]
