"""From the export of each annotation tool to a fine-tuned model, and its predictions back to the
tool's own reader, by the commands that a user gives.

Readers that are not in the environment of the tests run in one of their own
(tests/tool_environments.py).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import dcris.assets
import tool_exports
from annotated import OBJECTS
from conftest import make_tiny_refer
from dcris.cli import main
from dcris.data.readers.load import load_references
from tool_environments import environment

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[1] / "benchmarks/annotation_tools.py"


@dataclass(frozen=True)
class Tool:
    make: Callable[[Path], Path]
    """Writes the tool's export into a folder."""
    back: str
    """Format of `dcris data export`."""
    reader: str
    """Of benchmarks/annotation_tools.py."""
    environment: str | None = None
    exact: bool = True
    """Whether its reader sees exactly the exported pixels."""
    has_phrases: bool = True
    objects: int = len(OBJECTS)


def refer(folder: Path) -> Path:
    return make_tiny_refer(folder).write() / "tiny"


TOOLS = {
    "CVAT": Tool(tool_exports.cvat_coco, "coco", "pycocotools"),
    "Label Studio": Tool(tool_exports.label_studio, "label-studio", "label_studio", "label-studio"),
    "labelme": Tool(tool_exports.labelme_itself, "labelme", "labelme", "labelme"),
    # A page that runs in a browser, so its reader of COCO is not tested here.
    "VIA": Tool(tool_exports.via_2, "coco", "pycocotools", objects=3),
    "YOLO": Tool(tool_exports.roboflow_yolo, "yolo", "supervision", exact=False, has_phrases=False),
    "Supervisely": Tool(tool_exports.supervisely_itself, "supervisely", "supervisely", "supervisely"),
    "Datumaro": Tool(tool_exports.datumaro, "coco", "datumaro", "datumaro"),
    "FiftyOne": Tool(tool_exports.fiftyone, "coco", "fiftyone", "fiftyone"),
    "Roboflow": Tool(tool_exports.roboflow, "coco", "roboflow", has_phrases=False),
    "REFER": Tool(refer, "refer", "refer", objects=3),
}


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_from_an_export_to_the_tool_s_own_reader(tool: Tool, tmp_path: Path) -> None:
    python = sys.executable if tool.environment is None else environment(tool.environment) / "python"
    data, root = tmp_path / "data/my.jsonl", tmp_path / "data"
    source: list[object] = [tool.make(root), "--images", root]
    if not tool.has_phrases:  # list the objects whose category fits another one, too, and fill in phrases
        run("data", "import", *source, "--write-phrases", root / "todo.csv")
        head, *rows = (root / "todo.csv").read_text().splitlines()
        filled = [row + item.phrase for row, item in zip(rows, OBJECTS[:2], strict=True)]
        (root / "todo.csv").write_text("\n".join([head, *filled]) + "\n")
        source += ["--phrases", root / "todo.csv", "--crowds", "keep"]
    run("data", "import", *source, "--out", data, "--split", "train")
    run("data", "check", data, "--deep")
    references = load_references(data, None).references
    assert len(references) == tool.objects
    recipe = Path(dcris.assets.__file__).parent / "tiny/config.json"
    run("train", recipe, "--data", data, "--from", "tiny", "--out", tmp_path / "run", "--device", "cpu",
        "--train.max_steps", 50, "--train.batch_size", 4, "--data.workers", 0)  # fmt: skip
    pairs = [{"image": str(item.image_path), "phrase": item.expressions[0].text} for item in references]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run("predict", tmp_path / "run", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "out", "--format", "coco",
        "--device", "cpu", "--min-score", 0)  # fmt: skip
    predicted = root / "predicted.jsonl"
    run(
        "data", "import", tmp_path / "out/predictions.json", "--images", root, "--out", predicted, "--ambiguous", "keep"
    )
    found = load_references(predicted, None).references
    assert len(found) >= 2, "the model draws too few masks for a comparison"

    def benchmark(program: Path | str, *words: object) -> str:
        command = [str(program), str(BENCHMARK), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    work = tmp_path / "work"
    trip = benchmark(sys.executable, "trip", predicted, work, "--format", tool.back)
    assert f"{len(found)} of {len(found)} references, IoU least 1.000000" in trip
    line = benchmark(python, "readers", work, tool.reader).splitlines()[-1]
    assert f"{len(found)} references" in line
    assert float(line.partition("IoU least ")[2].partition(",")[0]) >= (1 if tool.exact else 0.6), line
