"""`dcris ablate`: rows become runs, runs are shared and skipped, and tables are written."""

import errno
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import TinyRefer
from dcris import cli
from dcris.checkpoints.checkpoint import list_checkpoints, load_checkpoint
from dcris.cli import main
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Cris
from dcris.experiments import ablate as module
from dcris.experiments.ablate import Size, ablate, configure, recipe_study, table_study
from dcris.experiments.ablation_report import Measured, summary, write_ablation
from dcris.experiments.paper_tables import DATA_SET, SIZES, SPLITS, TABLES, Row, Table
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES, Recipe, get_recipe
from dcris.training import trainer
from dcris.utils.files import write_json
from launcher import Launcher

FIXED = Row(("Fixed",), "fixed", name="fixed backbone", parameters="0.00M", scores=(74.9, 77.1, 72.0))
DEFAULT = Row(("DCRIS",), parameters="2.69M", scores=(76.4, 77.9, 73.7))
SMALL = Table("Table 9: small", ("Method",), (FIXED, DEFAULT))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Replace the paper's tables by two tables of two rows and one with a row that fails."""
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
    monkeypatch.setattr("dcris.cli._parser", cli._parser.__wrapped__)  # with these tables
    return tables


@pytest.fixture
def quiet_study(scenes_root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs a table on a few scenes, two steps a run."""

    def run(name: str, out: Path = tmp_path / "out", **more: Any) -> list[str]:
        settings: dict[str, Any] = {"seeds": (0,), "steps": 2, "device": "cpu", "log": len}
        return ablate(table_study(name, "tiny"), out, root=scenes_root, **{**settings, **more})

    return run


def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that collects the folders of the runs trained from now on."""
    folders: list[Path] = []
    train = module.train_and_score

    def recording(run: Any, *rest: Any) -> Any:
        folders.append(run.folder)
        return train(run, *rest)

    monkeypatch.setattr(module, "train_and_score", recording)
    return folders


def planned_configs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return a list of the configurations of the runs, which fail instead of training."""
    configs: list[RunConfig] = []

    def fail(run: Any, *_: Any) -> Any:
        configs.append(run.config)
        raise DcrisError("not trained")

    monkeypatch.setattr(module, "train_and_score", fail)
    return configs


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_of_table_5_have_the_papers_counts() -> None:
    """The number of trainable weights is the one printed beside the row's score."""
    for row in TABLES["table5"].rows[::4]:  # 1, 5 and 12 layers
        with torch.device("meta"):
            counts = ReferringSegmenter(configure(row, "b").model).count_weights()
        assert f"{counts['adapters'] / 1e6:.2f}M" == row.parameters
        assert configure(row, "tiny").model.method.visual.layers == row.changes["model.method.visual.layers"]


def test_widths_keep_their_ratio_in_small_towers() -> None:
    """On the tiny towers, the paper's widths would exceed the towers' own."""
    widths = [
        (config.method.visual.width, config.method.text.width)
        for size in ("b", "tiny")
        for config in (configure(row, size).model for row in TABLES["table4"].rows)
    ]
    assert widths == [(64, 64), (128, 64), (128, 128), (256, 128), (16, 24), (32, 24), (32, 48), (64, 48)]
    assert table_study("table4", "b").cells[0] == ("64, 64",)
    assert table_study("table4", "tiny").cells[0] == ("64, 64 (here 16, 24)",)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_the_default_once(name: str) -> None:
    """Its time is the budget of equal time, and no row is in a table twice."""
    rows = TABLES[name].rows
    default = get_recipe("dcris_b").model
    found = sum("b" in row.sizes and configure(row, "b").model == default for row in rows)
    assert found == (len(rows) if name == "options" else 1)  # options do not change the network
    assert table_study(name, "b").default.model == default
    assert len({(row.recipe, *map(str, row.changes.items())) for row in rows}) == len(rows)
    assert all(len(row.cells) == len(TABLES[name].columns) for row in rows)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("size", SIZES)
def test_every_row_can_be_run(name: str, size: Size) -> None:
    """A row that cannot be made on some towers would fail after hours of the others."""
    if (name, size) == ("table5", "photos"):
        with pytest.raises(DcrisError, match="12 transformer blocks"):
            table_study(name, size)
        return
    assert all(isinstance(config, RunConfig) for config in table_study(name, size).configs)


def test_a_setting_is_not_taken_for_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`--recipes` leaves TABLE out; the value of a setting must not become it, negative or not."""
    words = ["ablate", "--recipes", "fixed_tiny", "dcris_tiny", "--out", str(tmp_path / "out")]
    assert main([*words, "--train.lr", "-1"]) == 2
    assert "train.lr" in capsys.readouterr().err
    assert main([*words[:4], "--train.lr", *words[4:]]) == 2
    assert "--train.lr has no value" in capsys.readouterr().err


def test_settings_change_all_rows() -> None:
    """The photographs need generated phrases in every row, or the rows do not compare."""
    study = table_study("table3", "photos").changed({"data.generate_phrases": True, "data.image_size": 320})
    for config in study.configs:
        assert isinstance(config, RunConfig)
        assert config.data.generate_phrases and config.data.image_size == 320
    with pytest.raises(DcrisError, match=r"unknown setting data\.magic"):
        study.changed({"data.magic": 1})
    with pytest.raises(DcrisError, match=r"leave out --train\.seed and --train\.keep_last, .* --seeds"):
        study.changed({"train.keep_last": 2, "train.seed": 7})


@pytest.mark.parametrize(
    ("settings", "length", "expected"),
    [
        ({"train.max_steps": 3}, {}, (3, 40)),
        ({"train.epochs": 2}, {}, (None, 40)),
        ({"train.max_steps": 3}, {"steps": 50}, (50, 40)),
        ({"train.max_steps": 3}, {"epochs": 2}, (None, 40)),
        ({"train.lr": 0.01}, {}, (100, 5)),
    ],
)
def test_a_length_is_a_setting_of_all_rows(
    settings: dict[str, Any],
    length: dict[str, int],
    expected: tuple[int | None, int],
    scenes_root: Path,
    tables: dict[str, Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial of 3 steps must not train for the hours of the default; `--steps` comes first."""
    planned = planned_configs(monkeypatch)
    ablate(table_study("table9", "tiny").changed(settings), tmp_path, root=scenes_root, device="cpu", log=len, **length)
    assert {(config.train.max_steps, config.train.warmup_steps) for config in planned} == {expected}


def test_a_word_length_is_a_setting_of_all_rows(
    tiny_refer: TinyRefer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phrases are cut where the user says, not where the data set's usually are."""
    tiny_refer.dataset, tiny_refer.split_by = "refcocog", "umd"
    root, planned = tiny_refer.write(), planned_configs(monkeypatch)
    named = {"data.dataset": "refcocog", "data.split_by": "umd"}
    for settings, dataset in (({}, "refcocog"), ({"data.word_length": 9}, "refcocog"), (named, None)):
        study = recipe_study(["dcris_b", "lora_b"]).changed(settings)
        ablate(study, tmp_path / "out", root=root, dataset=dataset, seeds=(0,), device="cpu", log=len)
    assert [config.data.word_length for config in planned] == [22, 22, 9, 9, 22, 22]


def test_soft_masks_are_trained_with_a_threshold(tables: dict[str, Table], tmp_path: Path) -> None:
    """The advice in the error of a soft mask can be followed."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    Image.linear_gradient("L").resize((20, 10)).save(tmp_path / "mask.png")
    line = {"image": "a.png", "mask": "mask.png", "expressions": ["ring"]}
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({**line, "split": split}) + "\n" for split in ("train", "val")))
    words = ("ablate", "table9", "--recipe", "tiny", "--data", data, "--out", tmp_path / "out", "--seeds", 0)
    words += ("--budget", "steps", "--train.max_steps", 1, "--device", "cpu", "--data.workers", 0)
    assert main([str(word) for word in (*words, "--data.mask_threshold", 0.5)]) == 0


def test_rows_of_table_3_leave_out_adapters() -> None:
    """The four rows have no, the visual, the text and both adapters."""
    none, visual, textual, both = (configure(row, "tiny").model for row in TABLES["table3"].rows)
    assert (none.method, visual.method.text, textual.method.visual) == (None,) * 3
    assert visual.method.visual == both.method.visual
    assert textual.method.text == both.method.text


# ---- running -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_is_run_written_and_skipped(
    quiet_study: Callable[..., list[str]],
    tables: dict[str, Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All files are written, finished runs are not repeated, and tables share runs."""
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
    # The steps of equal time fill the default's seconds to half a step; the default is not
    # run again.
    longer = rows["time"][0]["runs"][0]
    rate = fixed["seconds_per_step"]
    assert longer["steps"] == 1 or abs(longer["steps"] * rate - default["seconds"]) <= rate / 2
    assert rows["time"][1]["runs"][0] == default
    assert len(folders) == len(set(folders)) == 3
    assert "Equal time" in written["table9.md"]
    assert r"\toprule" in written["table9.tex"]
    assert "<svg" in written["table9.html"]
    assert "http" not in written["table9.html"].split("</title>")[1].replace("http-equiv", "")

    # The same table trains nothing, another table only what no table had.
    assert quiet_study("table9") == []
    assert len(folders) == 3
    assert (out / "table9.md").read_text() == written["table9.md"]
    assert quiet_study("table8", budgets=("steps",)) == []
    assert len(folders) == 4
    # A damaged result is computed again.
    (out / default["run"] / "result.json").write_text('{"key"')
    assert quiet_study("table8", budgets=("steps",)) == []
    assert len(folders) == 5
    assert json.loads((out / default["run"] / "result.json").read_text())["scores"] == default["scores"]


def test_equal_time_gives_cheaper_rows_more_steps(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps of half the default's time, a row gets twice the steps and schedule."""
    runs = {}

    def train(run: Any, table: Any, splits: Any, device: Any) -> dict[str, Any]:
        settings, method = run.config.train, run.config.model.method
        runs[method is None, settings.max_steps] = settings
        rate = 0.5 if method is None else 1.0
        found = result(settings.seed, **dict.fromkeys(splits, 50.0)) | {
            "key": run.key,
            "steps": settings.max_steps,
            "seconds": rate * settings.max_steps,
            "seconds_per_step": rate,
        }
        write_json(run.folder / "result.json", found)
        return found

    monkeypatch.setattr(module, "train_and_score", train)
    assert quiet_study("table9", steps=1700) == []
    rows = json.loads((tmp_path / "out" / "table9.json").read_text())
    assert [[item["runs"][0]["steps"] for item in rows[budget]] for budget in ("steps", "time")] == [
        [1700, 1700],
        [3400, 1700],
    ]
    assert runs.keys() == {(True, 1700), (False, 1700), (True, 3400)}
    equal, longer = runs[True, 1700], runs[True, 3400]
    assert (equal.warmup_steps, longer.warmup_steps) == (40, 80)
    assert longer.milestones == tuple(2 * milestone for milestone in equal.milestones)


def test_any_recipes_are_compared(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipes of any name are compared on the given data set; the first is the baseline."""
    own = replace(get_recipe("lora_tiny"), {"recipe": "own", "train.max_steps": 900, "data.dataset": "other"})
    monkeypatch.setitem(RECIPES, "own", Recipe(own, "A recipe of one size."))
    out = tmp_path / "out"
    data = ("--data", scenes_root, "--dataset", "scenes", "--out", out, "--device", "cpu", "--seeds", 0)
    words = ("ablate", "--recipes", "fixed_tiny", "own", *data, "--budget", "steps", "--steps", 2)
    assert main([str(word) for word in words]) == 0
    assert f"written: {out / 'recipes'}.md" in capsys.readouterr().out
    rows = json.loads((out / "recipes.json").read_text())["steps"]
    assert [item["name"] for item in rows] == ["fixed_tiny", "own"]
    assert [item["runs"][0]["recipe"] for item in rows] == ["fixed_tiny", "own"]
    assert [item["runs"][0]["steps"] for item in rows] == [2, 2]
    assert rows[1]["runs"][0]["scores"]["test"]["dataset"] == "scenes"
    page = (out / "recipes.md").read_text()
    assert "Paper's" not in page  # a column of dashes
    assert "train as many seconds as fixed_tiny" in page.replace("trains", "train")

    study = recipe_study(["dcris_tiny", "own"])
    assert study.steps == get_recipe("dcris_tiny").train.max_steps  # that of the first
    for names, message in (
        (["dcris_tiny"], "two or more"),
        (["own", "own"], "two or more"),
        (["own", "magic"], "'magic'"),
    ):
        with pytest.raises(DcrisError, match=message):
            recipe_study(names)
    for bad in (("ablate", *data), ("ablate", "table3", "--recipes", "own", "dcris_tiny", *data)):
        assert main([str(word) for word in bad]) == 2
        assert "either a TABLE or --recipes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_row_does_not_stop_the_others(
    quiet_study: Callable[..., list[str]],
    tables: dict[str, Table],
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is printed and in the table, and the next call tries the row again."""
    out = tmp_path / "cli"
    command = ["ablate", "table7", "--recipe", "tiny", "--data", scenes_root, "--out", out, "--seeds", 0, "--steps", 1]
    assert main([str(word) for word in [*command, "--budget", "steps", "--device", "cpu"]]) == 2
    printed = capsys.readouterr()
    assert "1 rows failed (Magic: failed: unknown recipe 'magic_tiny'" in printed.err
    page = (out / "table7.md").read_text()
    assert "failed: unknown recipe 'magic_tiny'" in page
    assert len(json.loads((out / "table7.json").read_text())["steps"][1]["runs"]) == 1

    # An error of any class inside a run.
    train = module.train_and_score

    def failing(run: Any, *rest: Any) -> Any:
        if run.config.model.method is None:
            raise ValueError("not\ntoday")
        return train(run, *rest)

    monkeypatch.setattr(module, "train_and_score", failing)
    failures = quiet_study("table9")
    assert failures == ["fixed backbone: failed: ValueError: not"] * 2
    assert "failed: ValueError: not" in (tmp_path / "out" / "table9.html").read_text()
    monkeypatch.setattr(module, "train_and_score", train)
    assert quiet_study("table9") == []


@pytest.mark.slow
def test_an_interrupted_study_continues(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C loses neither what was trained nor its time."""
    predict = module.predict_queries

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "predict_queries", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quiet_study("table9", budgets=("steps",))
    (run,) = (tmp_path / "out" / "runs").iterdir()
    spent = json.loads((run / "time.json").read_text())
    assert spent["steps"] == 2
    monkeypatch.setattr(module, "predict_queries", predict)
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads((run / "time.json").read_text()) == spent
    assert json.loads((run / "result.json").read_text())["seconds"] == pytest.approx(spent["seconds"])


@pytest.mark.slow
def test_a_killed_run_is_completed(
    quiet_study: Callable[..., list[str]], tables: dict[str, Table], tmp_path: Path
) -> None:
    """A run without its time, or with an incomplete checkpoint, must not fail for ever."""
    assert quiet_study("table9", budgets=("steps",)) == []
    file, *_ = (tmp_path / "out" / "runs").glob("*/result.json")
    run, expected = file.parent, json.loads(file.read_text())
    # Killed after the last step, before its time was recorded.
    file.unlink()
    (run / "time.json").unlink()
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads(file.read_text())["scores"] == expected["scores"]
    assert json.loads((run / "time.json").read_text())["steps"] == 2
    # Killed before the newest checkpoint was on the disk.
    file.unlink()
    damaged = run / "checkpoints" / "step-00000003"
    damaged.mkdir()
    (damaged / "state.json").write_text("")
    assert quiet_study("table9", budgets=("steps",)) == []
    assert json.loads(file.read_text())["scores"] == expected["scores"]


@pytest.mark.slow
def test_lazy_initialisation_is_not_charged_to_a_run() -> None:
    """After the warm-up, an optimiser's first step imports few modules."""
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


def test_a_lock_is_held_once(launcher: Launcher, tmp_path: Path) -> None:
    """Two processes must not write one run, and a lock is free after its holder."""
    path = tmp_path / "run" / ".lock"
    code = f"""if True:
        from pathlib import Path
        from dcris.experiments.ablate import _try_lock
        with _try_lock(Path({str(path)!r})) as held:
            print(held)
    """

    with module._try_lock(path) as held:
        assert held
        assert launcher.run_code(code, tmp_path / "one.txt") == "False\n"
    assert launcher.run_code(code, tmp_path / "other.txt") == "True\n"
    with module._try_lock(path) as again:
        assert again


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study must not wait there for other processes."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with module._try_lock(tmp_path / ".lock") as held:
        assert held


def test_invalid_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing data and an unknown table are errors."""
    assert main(["ablate", "table3", "--out", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err
    with pytest.raises(DcrisError, match="unknown table 'table6'"):
        table_study("table6", "b")


def test_data_without_a_split_to_evaluate_on_raise(tables: dict[str, Table], tmp_path: Path) -> None:
    """The error comes before anything is trained."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    line = {"image": "a.png", "mask": [[1, 1, 9, 1, 9, 9]], "expressions": ["ring"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    with pytest.raises(DcrisError, match=r"own in .* has no split to evaluate on, only 'train'"):
        ablate(table_study("table9", "tiny"), tmp_path / "out", root=tmp_path / "own.jsonl", device="cpu")


def test_a_validation_split_that_is_chosen_is_used_or_refused(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a recipe's own split may be left out where a data set lacks it."""
    configs, out = planned_configs(monkeypatch), tmp_path / "out"
    words = ["ablate", "--recipes", "fixed_tiny", "dcris_tiny", "--data", str(scenes_root), "--out", str(out)]
    assert main([*words, "--data.val_split", "dev"]) == 2
    assert "no split 'dev'" in capsys.readouterr().err
    assert not out.exists()
    main([*words, "--data.val_split", "train", "--steps", "2", "--seeds", "0", "--budget", "steps"])
    assert [config.data.val_split for config in configs] == ["train", "train"]


@pytest.mark.parametrize("words", [("--dataset", "other"), ("--split-by", "umd")])
def test_a_file_is_one_data_set(words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever names another data set than the file must not get the scores of the file."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    line = {"image": "a.png", "mask": [[1, 1, 9, 1, 9, 9]], "expressions": ["ring"]}
    lines = [json.dumps({**line, "split": split}) for split in ("train", "test")]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    data = ("--data", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "out"), "--steps", "1")
    assert main(["ablate", "--recipes", "fixed_tiny", "dcris_tiny", *data, *words]) == 2
    assert "is a single data set, own; leave out --dataset and --split-by" in capsys.readouterr().err


def test_an_invalid_seed_raises(quiet_study: Callable[..., list[str]], tables: dict[str, Table]) -> None:
    """The error comes before anything is trained."""
    with pytest.raises(DcrisError, match=r"invalid setting: train\.seed"):
        quiet_study("table9", seeds=(2**32,))


# ---- tables --------------------------------------------------------------------------------------


def result(seed: int, **miou: float) -> dict[str, Any]:
    """Return a run's result with these scores by split."""
    scores = {split: {"miou": value, "oiou": value + 1} for split, value in miou.items()}
    return {"counts": {"adapters": 2_694_048}, "steps": 10, "seconds_per_step": 0.5, "seed": seed, "scores": scores}


def test_the_papers_numbers_are_beside_ours(tmp_path: Path) -> None:
    """They are shown for the paper's data set and splits only."""
    towers = 150_011_649
    runs = (result(0, val=70, testA=72, testB=68), result(1, val=74, testA=76, testB=72))
    ours = Measured(DEFAULT, "DCRIS", ("DCRIS",), runs, towers)
    poor = Measured(FIXED, "fixed", ("Fixed",), (), towers, "failed: out of memory")
    notes = ["a note"]
    page = write_ablation(tmp_path, "t", SMALL, {"steps": [poor, ours]}, splits=SPLITS, data=DATA_SET, notes=notes)
    (line,) = (line for line in page.splitlines() if line.startswith("| DCRIS"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2,694,048", "2.69M", "1.80"]
    assert cells[6:8] == ["72.0 \N{PLUS-MINUS SIGN} 2.8", "73.0 \N{PLUS-MINUS SIGN} 2.8"]
    assert cells[-5:] == ["72.0", "76.4", "77.9", "73.7", "76.0"]
    assert "failed: out of memory" in page
    elsewhere = write_ablation(
        tmp_path, "t", SMALL, {"steps": [ours]}, splits=("val",), data=("refcoco+", "unc"), notes=notes
    )
    assert "76.4" not in elsewhere


def test_the_summary_states_the_deviation_between_seeds() -> None:
    """A lead that may be chance must not read as a result."""

    def item(name: str, *scores: float) -> Measured:
        runs = tuple(result(seed, test=score) for seed, score in enumerate(scores))
        return Measured(DEFAULT, name, (name,), runs, 150_011_649)

    sentence = summary([item("a", 50, 52), item("b", 60, 61), item("c")], ["test"])
    assert sentence.startswith("Best: b, mIoU 60.50; then a, 51.00.")
    assert "9.50 points: decided, as it is more than twice the seeds' deviation of 1.41" in sentence
    sentence = summary([item("a", 50, 56), item("b", 60, 61)], ["test"])
    assert "7.50 points: undecided, as it is not more than twice the seeds' deviation of 4.24" in sentence
    assert "one seed shows no variation" in summary([item("a", 40), item("b", 50)], ["test"])
    assert summary([item("a", 40)], ["test"]) == "There are no two rows to compare."


@pytest.mark.slow
def test_the_time_is_that_of_training(
    scenes_root: Path, tables: dict[str, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds a step, by which rows of equal time are compared, included validation on a CPU
    without a word, so that the table's times depended on the size of the validation split."""
    validate, calls = trainer.Trainer._validate, list[int]()

    def slow(self: trainer.Trainer) -> None:
        begin = time.process_time()
        while time.process_time() < begin + 5:
            pass
        calls.append(self.done)
        validate(self)

    monkeypatch.setattr(trainer.Trainer, "_validate", slow)
    study = table_study("table9", "tiny").changed({"data.val_split": "val"})
    more = {"seeds": (0,), "steps": 2, "budgets": ("steps",), "device": "cpu", "log": len}
    assert ablate(study, tmp_path / "out", root=scenes_root, **more) == []
    assert calls == [2, 2]
    for file in (tmp_path / "out" / "runs").glob("*/result.json"):
        assert 0 < json.loads(file.read_text())["seconds"] < 5


@pytest.mark.slow
def test_expressions_without_a_target_are_left_out(
    tables: dict[str, Table], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The protocol `cris` gave them IoU 0 whatever was predicted, also in validation, so that data
    with absent targets had low scores for no reason that was stated."""
    write_scenes(tmp_path, train=6, val=2, test=2, seed=5, generalised=True)
    table = load_references(tmp_path, "scenes")
    words = ("--data", str(tmp_path), "--seeds", "0", "--steps", "2", "--budget", "steps", "--data.val_split", "val")
    assert (
        main(["ablate", "table9", "--recipe", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 0
    )
    queries = {split: all_queries(table.split(split)) for split in ("val", "test")}
    present = {split: [each for each in some if each[0].targets(each[1])] for split, some in queries.items()}
    left_out = sum(len(queries[split]) - len(present[split]) for split in queries)
    assert left_out
    assert f"{left_out:,} expressions without a target are left out" in capsys.readouterr().out
    for file in (tmp_path / "out" / "runs").glob("*/result.json"):
        scores = json.loads(file.read_text())["scores"]
        assert {split: scores[split]["expressions"] for split in present} == {
            split: len(some) for split, some in present.items()
        }
    run = str(file.parent)
    state = json.loads((list_checkpoints(file.parent)[-1].path / "state.json").read_text())
    firsts = {reference.ref_id: expression for reference, expression in reversed(present["val"])}
    model, config = load_checkpoint(file.parent)
    validated = all_queries(table.split("val"), first_only=True, present_only=True)
    assert [expression for _, expression in validated] == [*reversed(firsts.values())]
    results = predict_queries(model, validated, config, Cris(), device="cpu", keep_masks=False)
    assert state["score"] == pytest.approx(summarise(each.overlap for each in results)["miou"], abs=1e-4)
    data = ("--data", str(tmp_path), "--split", "val", "--device", "cpu")
    assert main(["evaluate", run, *data]) == 0
    assert "--protocol grefcoco judges them" in capsys.readouterr().err
    assert main(["evaluate", run, *data, "--protocol", "grefcoco", "--none-rule", "any-pixel"]) == 0
    assert "judges them" not in capsys.readouterr().err
