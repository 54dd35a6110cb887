"""The paper's tables, run: rows become runs, runs are shared and skipped, failures are told, and the numbers come out."""

import errno
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dcris.cli import main
from dcris.errors import DcrisError
from dcris.experiments import ablate as module
from dcris.experiments.ablate import ablate, configure
from dcris.experiments.ablation_report import Measured, who_wins, write_ablation
from dcris.experiments.paper_tables import DATA_SET, SPLITS, TABLES, Row, Table
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe

FIXED = Row(("Fixed",), "fixed", name="fixed backbone", parameters="0.00M", scores=(74.9, 77.1, 72.0))
DEFAULT = Row(("DCRIS",), parameters="2.69M", scores=(76.4, 77.9, 73.7))
SMALL = Table("Table 9: small", ("Method",), (FIXED, DEFAULT))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Two tables of two rows and one of a row that fails, in place of the paper's."""
    other = Table(
        "Table 8",
        ("Method",),
        (
            DEFAULT,
            Row(("DCRIS, one layer",), changes={"model.method.visual.layers": (8,), "model.method.text.layers": (8,)}),
        ),
    )
    broken = Table("Table 7", ("Method",), (Row(("Magic",), "magic"), DEFAULT))
    tables = {"table9": SMALL, "table8": other, "table7": broken}
    monkeypatch.setattr(module, "TABLES", tables)
    monkeypatch.setattr("dcris.cli.ablate.TABLES", tables)
    return tables


@pytest.fixture
def quiet_study(scenes_root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Run a table on a few scenes, two steps a run."""

    def run(name: str, out: Path = tmp_path / "out", **more: Any) -> list[str]:
        settings: dict[str, Any] = {"seeds": (0,), "steps": 2, "device": "cpu", "log": len}
        return ablate(name, out, root=scenes_root, **{**settings, **more})

    return run


def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the runs that are trained from here on."""
    folders: list[Path] = []
    train = module.train

    def noting(*arguments: Any, **more: Any) -> Any:
        folders.append(arguments[4])
        return train(*arguments, **more)

    monkeypatch.setattr(module, "train", noting)
    return folders


# ---- what the rows are ---------------------------------------------------------------------------------------------------


def test_rows_of_table_5_have_the_papers_counts() -> None:
    """Else the row is another model than the one whose score stands beside it."""
    for row in TABLES["table5"].rows[::4]:  # 1, 5 and 12 layers: each more takes what the first took
        with torch.device("meta"):
            counts = ReferringSegmenter(configure(row, "b").model).count_weights()
        assert f"{counts['adapters'] / 1e6:.2f}M" == row.parameters
        assert configure(row, "tiny").model.method.visual.layers == row.changes["model.method.visual.layers"]


def test_widths_keep_their_ratio_in_small_towers() -> None:
    """Else table 4 compares something else on the tiny towers: a width above the tower's own."""
    widths = [
        (config.method.visual.width, config.method.text.width)
        for size in ("b", "tiny")
        for config in (configure(row, size).model for row in TABLES["table4"].rows)
    ]
    assert widths == [(64, 64), (128, 64), (128, 128), (256, 128), (16, 24), (32, 24), (32, 48), (64, 48)]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_the_default_once(name: str) -> None:
    """Else there is no time to keep equal, or the same run stands twice in a table."""
    rows = TABLES[name].rows
    default = get_recipe("dcris_b").model
    assert sum(row.only is None and configure(row, "b").model == default for row in rows) == 1
    assert len({(row.recipe, *map(str, row.changes.items())) for row in rows}) == len(rows)
    assert all(len(row.cells) == len(TABLES[name].columns) for row in rows)


def test_adapters_are_left_out_where_a_row_says_so() -> None:
    """Else table 3 measures four times the same."""
    none, visual, textual, both = (configure(row, "tiny").model for row in TABLES["table3"].rows)
    assert (none.method, visual.method.text, textual.method.visual) == (None,) * 3
    assert visual.method.visual == both.method.visual
    assert textual.method.text == both.method.text


# ---- running them ----------------------------------------------------------------------------------------------------


def test_a_table_is_run_written_and_skipped(
    quiet_study: Callable[..., list[str]],
    tables: dict[str, Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a study is not what its table says, or a day of runs is done twice."""
    folders = trained(monkeypatch)
    out = tmp_path / "out"
    assert quiet_study("table9") == []
    written = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
    assert set(written) == {"table9.md", "table9.tex", "table9.html", "table9.json"}
    rows = json.loads(written["table9.json"])
    fixed, default = (item["runs"][0] for item in rows["steps"])
    assert [item["name"] for item in rows["time"]] == ["fixed backbone", "DCRIS"]
    assert (fixed["counts"]["adapters"], fixed["steps"], default["steps"]) == (0, 2, 2)
    assert fixed["scores"]["test"]["expressions"] == default["scores"]["test"]["expressions"] > 0
    # As many steps as fit into the default's time; the default itself is not run again.
    longer = rows["time"][0]["runs"][0]
    assert longer["steps"] == max(1, round(default["seconds"] / fixed["seconds_per_step"]))
    assert rows["time"][1]["runs"][0] == default
    assert len(folders) == len(set(folders)) == 3
    assert "Equal time" in written["table9.md"]
    assert r"\toprule" in written["table9.tex"]
    assert "<svg" in written["table9.html"]
    assert "http" not in written["table9.html"].split("</title>")[1].replace("http-equiv", "")

    # Again: nothing is trained. Another table: only what no table had.
    assert quiet_study("table9") == []
    assert len(folders) == 3
    assert (out / "table9.md").read_text() == written["table9.md"]
    assert quiet_study("table8", budgets=("steps",)) == []
    assert len(folders) == 4
    # A spoilt result, or one of other data, is no result.
    (out / default["run"] / "result.json").write_text('{"key"')
    assert quiet_study("table8", budgets=("steps",)) == []
    assert len(folders) == 5
    assert json.loads((out / default["run"] / "result.json").read_text())["scores"] == default["scores"]


def test_a_row_that_fails_ends_no_other(
    quiet_study: Callable[..., list[str]],
    tables: dict[str, Table],
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else one method that runs out of memory costs the night's other rows, or is missed in silence."""
    out = tmp_path / "cli"
    command = ["ablate", "table7", "--recipe", "tiny", "--data", scenes_root, "--out", out, "--seeds", 0, "--steps", 1]
    assert main([str(word) for word in [*command, "--budget", "steps", "--device", "cpu"]]) == 2
    printed = capsys.readouterr()
    assert "1 of the rows failed (Magic: failed: unknown recipe 'magic_tiny'" in printed.err
    page = (out / "table7.md").read_text()
    assert "failed: unknown recipe 'magic_tiny'" in page
    assert len(json.loads((out / "table7.json").read_text())["steps"][1]["runs"]) == 1

    # An error of any kind inside a run; tried again next time.
    train = module.train

    def failing(model: ReferringSegmenter, config: Any, *rest: Any, **more: Any) -> Any:
        if config.model.method is None:
            raise ValueError("not\ntoday")
        return train(model, config, *rest, **more)

    monkeypatch.setattr(module, "train", failing)
    failures = quiet_study("table9")
    assert failures == ["fixed backbone: failed: ValueError: not"] * 2
    assert "failed: ValueError: not" in (tmp_path / "out" / "table9.html").read_text()
    monkeypatch.setattr(module, "train", train)
    assert quiet_study("table9") == []


def test_a_study_that_is_broken_off_goes_on(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Ctrl-C costs what was trained, or the time it took."""
    answer = module.predict_queries

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "predict_queries", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quiet_study("table9", budgets=("steps",))
    (run,) = (tmp_path / "out" / "runs").iterdir()
    spent = json.loads((run / "time.json").read_text())
    assert spent["steps"] == 2
    monkeypatch.setattr(module, "predict_queries", answer)
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads((run / "time.json").read_text()) == spent
    assert json.loads((run / "result.json").read_text())["seconds"] == pytest.approx(spent["seconds"])


def test_a_run_that_was_killed_is_finished(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table], tmp_path: Path
) -> None:
    """Else its row fails for ever, with advice that helps nobody."""
    assert quiet_study("table9", budgets=("steps",)) == []
    result, *_ = (tmp_path / "out" / "runs").glob("*/result.json")
    run, expected = result.parent, json.loads(result.read_text())
    # Behind the last step, before the time it took was noted.
    result.unlink()
    (run / "time.json").unlink()
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads(result.read_text())["scores"] == expected["scores"]
    assert json.loads((run / "time.json").read_text())["steps"] == 2
    # While the disk had not got the newest checkpoint yet, which training does without.
    result.unlink()
    damaged = run / "checkpoints" / "step-00000003"
    damaged.mkdir()
    (damaged / "state.json").write_text("")
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads(result.read_text())["scores"] == expected["scores"]


def test_what_libraries_do_on_first_use_is_no_runs_time() -> None:
    """Else the very first run, whose seconds the others are given, seems to take a second more than it does."""
    code = """
        import sys, torch
        from dcris.experiments.ablate import _warm_up
        from dcris.models.segmentation import ReferringSegmenter
        from dcris.recipes import get_recipe

        config = get_recipe("dcris_tiny")
        _warm_up(ReferringSegmenter(config.model), config)
        before = set(sys.modules)
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True).step()
        print(len(set(sys.modules) - before))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 20


def test_a_run_is_one_processs(tmp_path: Path) -> None:
    """Else two processes write one run's files, or a process that died keeps a run for ever."""
    path = tmp_path / "run" / ".lock"
    with module._claim(path) as mine:
        assert mine
        with module._claim(path) as other:
            assert not other
    with module._claim(path) as again:
        assert again


def test_a_disk_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a study on such a disk waits for ever for a process that is not there."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with module._claim(tmp_path / ".lock") as mine:
        assert mine


def test_what_was_asked_wrongly_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a person meets a traceback, or a study of the wrong thing."""
    assert main(["ablate", "table3", "--out", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err
    with pytest.raises(DcrisError, match="no table 'table6'"):
        ablate("table6", tmp_path)


def test_data_without_a_split_to_score_on_are_a_sentence(tables: dict[str, Table], tmp_path: Path) -> None:
    """Else every row is trained before it shows that there is nothing to write."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    line = {"image": "a.png", "mask": [[1, 1, 9, 1, 9, 9]], "expressions": ["ring"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    with pytest.raises(DcrisError, match=r"own in .* has nothing to score the rows on, only the split 'train'"):
        ablate("table9", tmp_path / "out", root=tmp_path / "own.jsonl", device="cpu")


def test_a_seed_that_no_run_takes_is_a_sentence(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table]
) -> None:
    """Else every row is trained, and its checkpoint cannot be read."""
    with pytest.raises(DcrisError, match=r"invalid setting: train\.seed"):
        quiet_study("table9", seeds=(2**32,))


# ---- what is written --------------------------------------------------------------------------------------------------


def result(seed: int, **miou: float) -> dict[str, Any]:
    """A run's result with these scores by split."""
    scores = {split: {"miou": value, "oiou": value + 1} for split, value in miou.items()}
    return {"counts": {"adapters": 2_694_048}, "steps": 10, "seconds_per_step": 0.5, "seed": seed, "scores": scores}


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    """Else nobody sees how far a reproduction is from the paper, or its numbers stand beside other data."""
    ours = Measured(
        DEFAULT, "DCRIS", ("DCRIS",), (result(0, val=70, testA=72, testB=68), result(1, val=74, testA=76, testB=72))
    )
    poor = Measured(FIXED, "fixed", ("Fixed",), (), "failed: out of memory")
    arguments = {"backbone": 150_011_649, "notes": ["a note"]}
    page = write_ablation(tmp_path, "t", SMALL, {"steps": [poor, ours]}, splits=SPLITS, data=DATA_SET, **arguments)
    (line,) = (line for line in page.splitlines() if line.startswith("| DCRIS"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2,694,048", "2.69M", "1.80"]
    assert cells[6:8] == ["72.0 \N{PLUS-MINUS SIGN} 2.8", "73.0 \N{PLUS-MINUS SIGN} 2.8"]
    assert cells[-5:] == ["72.0", "76.4", "77.9", "73.7", "76.0"]
    assert "failed: out of memory" in page
    elsewhere = write_ablation(
        tmp_path, "t", SMALL, {"steps": [ours]}, splits=("val",), data=("refcoco+", "unc"), **arguments
    )
    assert "76.4" not in elsewhere


def test_who_wins_is_said_with_its_doubt() -> None:
    """Else a difference that another seed would turn round is told as a victory."""

    def item(name: str, *scores: float) -> Measured:
        return Measured(DEFAULT, name, (name,), tuple(result(seed, test=score) for seed, score in enumerate(scores)))

    sentence = who_wins([item("a", 50, 52), item("b", 60, 61), item("c")], ["test"])
    assert sentence.startswith("Best: b, mIoU 60.5; then a, 51.0.")
    assert "more than the seeds' deviation of 1.4" in sentence
    assert "within the seeds' deviation of 14.1" in who_wins([item("a", 40, 60), item("b", 50, 51)], ["test"])
    assert "one seed says nothing" in who_wins([item("a", 40), item("b", 50)], ["test"])
    assert who_wins([item("a", 40)], ["test"]) == "There is nothing to compare yet."
