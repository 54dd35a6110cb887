"""Run the notebooks of examples/ and store their outputs in them, small enough for git: run
`python tools/run_notebooks.py [NOTEBOOK ...]`.
"""

import argparse
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(path: Path) -> None:
    """Run a notebook in its folder, and write it with its outputs."""
    import nbclient
    import nbformat

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="*", help="default: all of examples/")
    chosen = parser.parse_args().notebooks
    if missing := [path for path in chosen if not path.is_file()]:
        parser.error(f"there is no notebook {missing[0]}")
    for each in chosen or sorted(EXAMPLES.glob("*.ipynb")):
        run(each)
