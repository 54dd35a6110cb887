"""Run the notebooks of examples/ and store their outputs in them, small enough for git: run
`python tools/run_notebooks.py [NOTEBOOK ...]`.
"""

import sys
from pathlib import Path

import nbclient
import nbformat

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(path: Path) -> None:
    """Run a notebook in its folder, and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources=where, coalesce_streams=True
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/jpeg" in data:  # Pillow gives both; a photograph as a PNG takes five times the space
                data.pop("image/png", None)
    notebook.metadata.pop("language_info", None)  # the version of Python
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for each in [Path(word) for word in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        run(each)
