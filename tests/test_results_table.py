"""Tables of results: columns of scores that compare, averages, marks, costs, categories, and the
paper's table 1; and the command that evaluates every data set and split below a folder."""

import csv
import html
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from conftest import make_tiny_refer
from dcris.cli import main
from dcris.data.readers.load import list_data_sets, load_references
from dcris.errors import DcrisError
from dcris.evaluation.evaluate import Runner
from dcris.evaluation.protocols import PROTOCOLS
from dcris.experiments.evaluate_all import averages, evaluate_all
from dcris.experiments.paper_tables import TABLE_1, TABLE_1_SPLITS
from dcris.utils.text_tables import comma_separated, latex, markdown
from latex import compile_latex, needs_pdflatex

EVIL = r"[*a_b & 50% \x ~^{}#$<i>|"


def dcris(*words: object) -> int:
    return main([str(word) for word in words])


def record(split: str, miou: float, protocol: str = "cris", dataset: str = "refcoco", **more: Any) -> dict[str, Any]:
    """A result with this value as its first metric, and 0 or what is given as the others."""
    first, *others = PROTOCOLS[protocol].metrics
    return {
        first.key: miou,
        **{metric.key: 0.0 for metric in others},
        "dataset": dataset,
        "split_by": "unc",
        "split": split,
        "protocol": protocol,
        "threshold": PROTOCOLS[protocol].threshold,
        "data_sha256": f"{dataset} {split}",
        **more,
    }


def row(folder: Path, name: str, *records: Mapping[str, Any], cost: Mapping[str, float] | None = None) -> Path:
    path = folder / f"{name.replace(' ', '-')}.json"
    path.write_text(json.dumps({"name": name, "results": records, "cost": cost or {}}))
    return path


def table(capsys: pytest.CaptureFixture[str], *words: object) -> list[list[str]]:
    """Return the cells of the table that the command prints as CSV."""
    assert dcris("table", *words, "--format", "csv") == 0
    return [*csv.reader(io.StringIO(capsys.readouterr().out))]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two systems on RefCOCO and RefCOCO+."""
    ours = [record("val", 70.04), record("testA", 80.0), record("val", 60.0, dataset="refcoco+")]
    theirs = [record("val", 69.96), record("testA", 81.0), record("val", 50.0, dataset="refcoco+")]
    return [row(tmp_path, "ours", *ours, cost={"trained": 2.5e6, "seconds": 0.25}), row(tmp_path, "theirs", *theirs)]


# ---- scores --------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_data_sets_means(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """(70.04 + 80) / 2 = 75.02 and 60 give 67.51; the mean of the splits would be 70.01."""
    header, ours, theirs = table(capsys, *two, "--digits", 2)
    assert header == ["Method", "refcoco val", "refcoco testA", "refcoco+ val", "Avg"]
    assert ours == ["ours", "70.04", "80.00", "60.00", "67.51"]
    assert theirs[-1] == f"{((69.96 + 81) / 2 + 50) / 2:.2f}"


def test_the_best_is_bold_and_the_second_underlined(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Scores that read alike (70.0) have no winner. A third system that lacks a split has neither a
    score nor an average there."""
    third = row(two[0].parent, "third", record("testA", 79.0), record("val", 70.0, dataset="refcoco+"))
    assert dcris("table", *two, third) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["ours", "70.0", "<u>80.0</u>", "<u>60.0</u>", "**67.5**"]
    assert lines[3] == ["theirs", "70.0", "**81.0**", "50.0", "<u>62.7</u>"]
    assert lines[4] == ["third", "-", "79.0", "**70.0**", "-"]
    assert dcris("table", *two, third, "--format", "latex") == 0
    text = capsys.readouterr().out
    assert r"ours & 70.0 & \underline{80.0} & \underline{60.0} & \textbf{67.5} \\" in text
    assert r" & \multicolumn{2}{c}{refcoco} & \multicolumn{1}{c}{refcoco+} &  \\" in text
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}" in text


def test_scores_that_do_not_compare_have_columns_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another protocol, threshold or rule for absent targets changes scores by points."""
    files = [
        row(tmp_path, "a", record("val", 70.0), record("val", 50.0, "lavt")),
        row(tmp_path, "b", record("val", 71.0, threshold=0.4)),
        row(tmp_path, "c", record("val", 40.0, "grefcoco", none_rule="head")),
        row(tmp_path, "d", record("val", 41.0, "grefcoco", none_rule="pixels:50")),
    ]
    header, *rows = table(capsys, *files)
    assert len(header) == 6  # no average over two measurements of one split
    assert header[1:6] == [
        "refcoco val (cris, threshold 0.35) mIoU",
        "refcoco val (lavt) mIoU",
        "refcoco val (cris, threshold 0.4) mIoU",
        "refcoco val (grefcoco, none by head) gIoU",
        "refcoco val (grefcoco, none by pixels:50) gIoU",
    ]
    assert [[bool(cell) for cell in cells[1:6]] for cells in rows] == [
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]


def test_several_metrics_have_columns_and_averages(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    header, *_ = table(capsys, *two, "--metrics", "miou", "oiou")
    assert header[1:3] == ["refcoco val mIoU", "refcoco val oIoU"]
    assert header[-2:] == ["Avg mIoU", "Avg oIoU"]


def test_metrics_that_share_a_name_only_have_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gIoU counts absent targets by rule in `grefcoco` and by empty masks in `lisa`; the mIoU of
    `rrefcoco` is over references. Their mean is a score of nothing."""
    rule = {"none_rule": "head"}
    generalised = [record(name, 40.0, "grefcoco", dataset="grefcoco", **rule) for name in ("val", "testA")]
    reasoning = record("val", 50.0, "lisa", dataset="reasonseg")
    robust = record("val", 30.0, "rrefcoco", dataset="rrefcoco", **rule)
    header, _ = table(capsys, row(tmp_path, "a", *generalised, reasoning))
    assert header[1:] == ["grefcoco val", "grefcoco testA", "reasonseg val"]
    header, _ = table(capsys, row(tmp_path, "b", record("val", 70.0), robust), "--metrics", "miou")
    assert header[1:] == ["refcoco val", "rrefcoco val"]
    assert table(capsys, row(tmp_path, "c", *generalised))[0][-1] == "Avg"
    # Both protocols average the IoU over the expressions.
    same = record("val", 60.0, "phrasecut", dataset="phrasecut")
    assert table(capsys, row(tmp_path, "d", record("val", 70.0), same))[1][-1] == "65.0"


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("grefcoco", "lisa"), ["ciou"]),
        (("lisa", "gseval"), ["ciou"]),
        (("cris", "rrefcoco"), []),
        (("cris", "lavt"), ["miou", "oiou"]),
        (("cris", "phrasecut"), ["miou", *(f"prec@0.{tenths}" for tenths in range(5, 10))]),
        (("refzom", "rrefcoco"), ["oiou", *(f"prec@0.{tenths}" for tenths in range(5, 10))]),
    ],
)
def test_averages_are_of_one_definition(names: tuple[str, str], keys: list[str]) -> None:
    """`dcris evaluate --all` writes its averages into the result file, from where people copy
    them."""
    protocols = {name: PROTOCOLS[name] for name in names}
    records = [
        {"dataset": name, **{metric.key: 10.0 * place for metric in protocol.metrics}}
        for place, (name, protocol) in enumerate(protocols.items(), 1)
    ]
    assert averages(records, protocols) == dict.fromkeys(keys, 15.0)


def test_a_score_that_nothing_counts_for_is_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is null in a result file; older files, in which it is 0, can still be read."""
    rule = {"dataset": "grefcoco", "none_rule": "head"}
    new = row(tmp_path, "new", record("val", 40.0, "grefcoco", **rule, n_acc=None))
    old = row(tmp_path, "old", record("val", 30.0, "grefcoco", **rule))
    assert dcris("table", new, old, "--metrics", "giou", "n_acc") == 0
    assert [line.split("|")[3].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["-", "0.0"]
    protocols = {"grefcoco": PROTOCOLS["grefcoco"]}
    assert "n_acc" not in averages([record("val", 40.0, "grefcoco", **rule, n_acc=None)], protocols)
    assert "n_acc" in averages([record("val", 40.0, "grefcoco", **rule)], protocols)


def test_costs_are_unknown_where_they_were_not_measured(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    header, ours, theirs = table(capsys, *two, "--cost")
    assert header[-5:] == ["Adapters (M)", "Trainable (M)", "FLOPs (G)", "Memory (GiB)", "s / image"]
    assert ours[-5:] == ["", "2.50", "", "", "0.250"]
    assert theirs[-5:] == [""] * 5


def test_a_folder_of_single_results_is_one_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `dcris score --out` writes them, one for each split."""
    folder = tmp_path / "lavt"
    folder.mkdir()
    for split, value in (("val", 72.5), ("testA", 75.5)):
        (folder / f"{split}.json").write_text(json.dumps(record(split, value, "lavt")))
    header, cells = table(capsys, folder)
    assert dict(zip(header, cells, strict=True)) == {
        "Method": "lavt",
        "refcoco val": "72.5",
        "refcoco testA": "75.5",
        "Avg": "74.0",
    }


def test_a_file_to_write(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dcris("table", *two, "--names", "A", EVIL, "--format", "latex", "--out", tmp_path / "new/table.tex") == 0
    assert capsys.readouterr().out == ""
    text = (tmp_path / "new/table.tex").read_text()
    assert (
        r"{[}*a\_b \& 50\% \textbackslash{}x \textasciitilde{}\textasciicircum{}\{\}\#\$\textless{}i\textgreater{}"
        in text
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "not a result file"),
        ({}, "no 'dataset'"),
        ({**record("val", 1.0), "miou": "high"}, "no number as 'miou'"),
        ({**record("val", 1.0), "protocol": "mine"}, "no protocol 'mine'"),
        ({**record("val", 1.0), "refine": []}, "a 'refine' that is not text"),
        ({**record("val", 1.0), "miou": 10**400}, "no number as 'miou'"),
        ({**record("val", 1.0), "split": "\ud800"}, "not valid Unicode"),
        ({"name": "a", "results": {}, "cost": {}}, "not a list"),
        ({"name": "a", "results": [record("val", 1.0)] * 2, "cost": {}}, "two results of refcoco (unc) val"),
        ({"name": "a", "results": [], "cost": {"flops": None}}, "no number as 'flops'"),
        ({"name": "a", "results": [], "cost": {}}, "no result"),
        # A table of these would take gigabytes, or minutes.
        ({"name": "a" * 10_000, "results": [], "cost": {}}, "a 'name' of 10,000 characters; the limit is 1,000"),
        ({**record("val", 1.0), "split": "a" * 1_001}, "a 'split' of 1,001 characters"),
        ({"name": "a", "results": [record(str(n), 1.0) for n in range(1_001)], "cost": {}}, "1,001 results; the limit"),
    ],
)
def test_what_is_no_result_is_one_sentence(
    content: Any, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    assert dcris("table", path) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_systems_must_be_measured_on_the_same_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [row(tmp_path, "a", record("val", 1.0)), row(tmp_path, "b", record("val", 2.0, data_sha256="other"))]
    assert dcris("table", *files) == 2
    assert "a and b were measured on different references of refcoco (unc) val" in capsys.readouterr().err
    assert dcris("table", files[0], files[0]) == 2
    assert "called the same" in capsys.readouterr().err
    assert dcris("table", tmp_path / "none.json") == 2


def test_systems_are_ranked_in_each_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Systems are columns there: the best of a column would be the easiest category."""
    for name, cat, dog in (("a", 50.0, 90.0), ("b", 60.0, 80.0)):
        groups = [{"name": text, "expressions": 2, "miou": miou} for text, miou in (("cat", cat), ("dog", dog))]
        row(tmp_path, name, record("val", 70.0, analysis={"by_category": groups}))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    assert dcris("table", *files, "--by-category") == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [["cat", "2", "<u>50.0</u>", "**60.0**"], ["dog", "2", "**90.0**", "<u>80.0</u>"]]
    assert dcris("table", *files, "--by-category", "--format", "latex") == 0
    toprule, header = capsys.readouterr().out.splitlines()[1:3]
    assert (toprule, header) == (r"\toprule", r"Category & Expressions & a & b \\")  # no empty row between them


def test_results_without_categories_are_no_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty table, or a complaint about splits that are equal, does not say what is wrong."""
    of_references = row(tmp_path, "robust", record("val", 70.0, "rrefcoco", "rrefcoco", none_rule="any-pixel"))
    assert dcris("table", of_references, "--by-category") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no result has a mean IoU by category" in captured.err
    groups = {"by_category": [{"name": "cat", "expressions": 2, "miou": 50.0}]}
    one, other = (row(tmp_path, f"at {at}", record("val", 70.0, threshold=at, analysis=groups)) for at in (0.35, 0.4))
    assert dcris("table", one, other, "--by-category") == 2
    assert "on different splits or by other rules" in capsys.readouterr().err


def test_a_folder_has_the_costs_of_any_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "0.json").write_text(json.dumps(record("testA", 75.5)))
    row(folder, "all", record("val", 70.0), cost={"seconds": 0.25})
    assert table(capsys, folder, "--cost")[1][-1] == "0.250"


def test_what_a_table_cannot_show_is_said(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error in --metrics, or a result that is silently left out, would go unseen."""
    assert dcris("table", *two, "--metrics", "miou", "prec@0.55") == 2
    assert "no result has the metric prec@0.55;" in capsys.readouterr().err
    nothing = row(tmp_path, "nothing")
    assert dcris("table", *two, nothing) == 2
    assert "nothing.json" in capsys.readouterr().err
    assert dcris("table", *two, "--digits", 11) == 2
    assert "11 is more than 10" in capsys.readouterr().err
    lisa = row(tmp_path, "lisa", record("val", 70.0, "lisa"))
    assert dcris("table", lisa, "--paper") == 2
    assert "lisa has no result for table 1" in capsys.readouterr().err
    mixed = row(tmp_path, "mixed", record("val", 70.0), record("testA", 70.0, "lisa"))
    assert dcris("table", mixed, "--paper") == 0
    assert "these results of mixed: refcoco testA (lisa)\n" in capsys.readouterr().err


# ---- table 1 -------------------------------------------------------------------------------------


def test_the_averages_of_table_1_are_those_of_the_data_sets() -> None:
    """The paper's average is the mean of the data sets' means, so a typing error in a score would
    show. The averages of ReLA and CGFormer are exchanged in it; PolyFormer's and LISA's are over
    the splits."""
    exchanged = {"ReLA": 67.7, "CGFormer": 67.5}
    checked = 0
    for system in TABLE_1:
        if system.average is None or system.scores[0] is None:  # or the text lacks the first cell
            continue
        parts = [system.scores[:3], system.scores[3:6], system.scores[6:]]
        if system.name in ("PolyFormer-L", "LISA-7B"):
            parts = [system.scores]
        means = [sum(known) / len(known) for part in parts for known in [[each for each in part if each is not None]]]
        expected = exchanged.get(system.name, system.average)
        assert sum(means) / len(means) == pytest.approx(expected, abs=0.085), system.name
        checked += 1
    assert checked == 17


def test_table_1_with_a_system_below_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each kind of IoU, ranked among the rows of the same kind."""
    ours = [
        {**record(split, 90.0, dataset=dataset), "split_by": split_by, "oiou": 10.0}
        for dataset, split_by, split in TABLE_1_SPLITS[:8]
    ]
    path = row(tmp_path, "ours", *ours)
    header, *rows = table(capsys, path, "--paper")
    assert header[:4] == ["Method", "IoU", "Protocol", "RefCOCO val"]
    assert len(rows) == len(TABLE_1) + 2
    assert rows[-2][:4] == ["ours", "mIoU", "cris", "90.0"]
    assert rows[-1][:4] == ["ours", "oIoU", "cris", "10.0"]
    assert rows[-1][-2:] == ["", ""]  # no google split, so no average
    assert dcris("table", path, "--paper", "--format", "latex") == 0
    text = capsys.readouterr().out
    lines = {line.split(" & ")[0]: line for line in text.splitlines()}
    assert lines["DCRIS-L"].split(" & ")[3] == r"\underline{77.9}"  # after ours in mIoU
    assert lines["PolyFormer-L (CVPR 23)"].split(" & ")[3] == r"\textbf{76.0}"  # of those in oIoU
    assert text.count(r"\textit{") == 4
    assert lines["DCRIS-B"].endswith(r"\underline{65.9} & \underline{70.8} \\")  # ours has no average


# ---- every split ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `dcris evaluate --all` on the generated scenes."""
    path = tmp_path_factory.mktemp("all") / "row.json"
    words = ("--all", "--out", path, "--device", "cpu", "--name", "quick")
    assert dcris("evaluate", trained_run, "--data", scenes_root, *words) == 0
    return path


def test_every_split_is_evaluated_as_by_itself(
    evaluated: Path, trained_run: Path, scenes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(evaluated.read_text())
    assert [each["split"] for each in found["results"]] == ["val", "test"]
    for each in found["results"]:
        words = ("--data", scenes_root, "--split", each["split"], "--device", "cpu")
        assert dcris("evaluate", trained_run, *words) == 0
        alone = json.loads(capsys.readouterr().out)
        assert {key: value for key, value in each.items() if key != "analysis"} == alone
    assert found["averages"]["oiou"] == pytest.approx(sum(each["oiou"] for each in found["results"]) / 2)
    assert found["provenance"]["command"]
    assert found["cost"]["flops"] > 1e6
    assert 0.05 < found["cost"]["peak_memory"] < 100
    header, cells = table(capsys, evaluated, "--cost")
    assert header[:4] == ["Method", "scenes val", "scenes test", "Avg"]
    assert cells[0] == "quick"
    assert "" not in cells


def test_scores_by_category_are_those_of_their_expressions(
    evaluated: Path, scenes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over both splits, weighted by expressions."""
    rows = table(capsys, evaluated, "--by-category", "--digits", 6)
    assert rows[0] == ["Category", "Expressions", "quick"]
    references = [each for each in load_references(scenes_root, "scenes").references if each.split != "train"]
    counts = dict.fromkeys(sorted({reference.category for reference in references}), 0)
    for reference in references:
        counts[reference.category] += len(reference.expressions)
    assert [(name, int(count)) for name, count, _ in rows[1:]] == [*counts.items()]
    results = json.loads(evaluated.read_text())["results"]
    whole = sum(each["miou"] * each["expressions"] for each in results)
    assert sum(int(count) * float(score) for _, count, score in rows[1:]) == pytest.approx(whole, abs=1e-3)


def test_an_error_keeps_the_splits_before_it(
    trained_run: Path,
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Evaluating all sets of the field takes hours; an unreadable image must not cost them."""
    monkeypatch.setattr("dcris.experiments.evaluate_all.in_own_process", lambda *_: 1.0)  # which imports torch again
    root = tmp_path / "data"
    shutil.copytree(scenes_root, root)
    image = load_references(root, "scenes").split("test")[0].image_path
    image.write_bytes(image.read_bytes()[:100])
    words = ("--all", "--device", "cpu", "--out", tmp_path / "row.json")
    assert dcris("evaluate", trained_run, "--data", root, *words) == 2
    assert image.name in capsys.readouterr().err
    assert [each["split"] for each in json.loads((tmp_path / "row.json").read_text())["results"]] == ["val"]


def test_a_name_that_no_table_can_have_is_named_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's name may be any bytes; an error after the last split would cost a night."""
    make_tiny_refer(tmp_path).write()
    try:
        (tmp_path / "tiny").rename(tmp_path / os.fsdecode(b"t\xff"))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    monkeypatch.setattr(Runner, "load", lambda *args, **more: pytest.fail("the model was loaded"))
    assert dcris("evaluate", "tiny", "--data", tmp_path, "--all") == 2
    assert r"'t\udcff' cannot be a name in tables; rename that data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--split", "val"), "--split"),
        (("--report", "page.html"), "--report"),
        (("--refine", "guided"), "--refine"),
        (("--none-rule", "foo"), "there is no rule 'foo'"),
        (("--none-rule", "head"), "has no rule for absent targets"),
        (("--dataset", "refcoco"), "no split to evaluate of refcoco"),
        (("--name", " "), "' ' cannot be a name in tables; give another --name"),
    ],
)
def test_what_does_not_go_with_all_splits(
    words: tuple[str, ...], problem: str, scenes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dcris("evaluate", "tiny", "--data", scenes_root, "--all", "--device", "cpu", *words) == 2
    assert problem in capsys.readouterr().err


def test_data_sets_are_found_once(refer_root: Path, scenes_root: Path) -> None:
    assert list_data_sets(scenes_root) == [("scenes", "generated")]
    found = list_data_sets(refer_root)
    assert found[:3] == [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]
    assert ("cocomini", "templated") in found
    assert len(found) == 4


def test_other_files_beside_the_data_sets(scenes_root: Path, tmp_path: Path) -> None:
    """A table of numbers that somebody keeps there is no data set, and must not stop an evaluation
    of hours; the Hub's folders may have capitals."""
    shutil.copytree(scenes_root, tmp_path / "data")
    for name in ("notes/numbers.parquet", "RefCOCO/val-0.parquet"):
        (tmp_path / "data" / name).parent.mkdir()
        (tmp_path / "data" / name).touch()
    assert list_data_sets(tmp_path / "data") == [("refcoco", "unc"), ("scenes", "generated")]
    assert list_data_sets(tmp_path / "data", "scenes") == [("scenes", "generated")]
    (tmp_path / "data/RefCOCO/numbers.parquet").touch()
    assert list_data_sets(tmp_path / "data", "scenes") == [("scenes", "generated")]
    with pytest.raises(DcrisError, match="does not contain a split"):
        list_data_sets(tmp_path / "data")


def test_an_error_names_some_data_sets_of_a_folder(tmp_path: Path) -> None:
    """A folder with hundreds of them must not fill the terminal."""
    for number in range(30):
        (tmp_path / f"set{number:02}").mkdir()
        (tmp_path / f"set{number:02}/refs(mine).p").touch()
    (tmp_path / "set30").touch()
    assert len(list_data_sets(tmp_path)) == 30
    with pytest.raises(DcrisError, match=r"with --dataset: set00, .*, set19$"):
        load_references(tmp_path, "other")


def test_a_system_is_called_like_its_checkpoint(
    trained_run: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs v1.5 and v1.6 were both called v1, and one in the current folder nothing."""
    shutil.copytree(trained_run, tmp_path / "v1.5")
    monkeypatch.chdir(tmp_path / "v1.5")
    monkeypatch.setattr("dcris.experiments.evaluate_all.measure_cost", lambda runner: {})
    assert evaluate_all(".", scenes_root, device="cpu", log=lambda line: None)["name"] == "v1.5"


# ---- LaTeX ---------------------------------------------------------------------------------------

_DOCUMENT = r"""\documentclass{article}
\IfFileExists{booktabs.sty}{\usepackage{booktabs}}{%%
  \let\toprule\hline \let\midrule\hline \let\bottomrule\hline \def\cmidrule(##1)##2{\cline{##2}}}
\begin{document}
%s
\end{document}
"""


@pytest.mark.slow
@needs_pdflatex
def test_the_tables_compile(refer_root: Path, tmp_path: Path) -> None:
    """All tables of a checkpoint on the real sets, with a name of LaTeX's special characters."""
    results = tmp_path / "row.json"
    assert dcris("evaluate", "tiny", "--data", refer_root, "--all", "--out", results, "--name", EVIL) == 0
    tables = []
    for number, options in enumerate(
        [("--cost",), ("--paper", "--cost"), ("--by-category",), ("--metrics", "miou", "oiou")]
    ):
        path = tmp_path / f"{number}.tex"
        assert dcris("table", results, *options, "--format", "latex", "--out", path) == 0
        tables.append(path.read_text())
    tables.append(latex(["a", "b"], [[EVIL, "1"]], {(0, 1): "best"}, parts={0: EVIL}))
    document = _DOCUMENT % "\n\\clearpage\n".join(r"\tiny " + each for each in tables)
    assert compile_latex(tmp_path, document).read_bytes().startswith(b"%PDF")


def test_signs_in_a_name_do_not_end_a_cell() -> None:
    """A backslash before the escape of a pipe would undo it, and a name is not HTML."""
    assert markdown(["a"], [["x|y"]], {(0, 0): "best"}).splitlines()[-1] == r"| **x\|y** |"
    assert markdown(["a"], [["x\\|<b>\r\fy"]]).splitlines()[2:] == [r"| x\\\|\<b>  y |"]


@pytest.mark.parametrize("name", ["v1_2", "RefCOCO (umd)", "[1] R&D", "a_b_c.json", "!", "x > y", "10% [+1.0, +2.0]"])
def test_usual_names_in_markdown_are_as_they_were(name: str) -> None:
    assert markdown(["a"], [[name]]).splitlines()[-1].strip("| ") == name


@pytest.mark.parametrize(
    "name",
    [
        "![x](http://tracker/a.png)",
        "[x](http://a)",
        "**best**",
        "<u>b</u>",
        "`code`",
        "_a_ b",
        "__init__",
        "~~1~~",
        "&lt;b&amp;",
        "a\\*",
    ],
)
def test_a_name_is_no_markdown(name: str) -> None:
    """Result files come from others; a table on GitHub must not load their images, follow their
    links, or show marks that no score has earned."""
    github = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (cell,) = re.findall(r"<td[^>]*>(.*)</td>", github.render(markdown(["a"], [[name]])))
    assert html.unescape(cell) == name and "<" not in cell


def test_a_name_does_not_reverse_the_cells_after_it() -> None:
    """U+202E shows what follows from right to left: 12.3 as 3.21."""
    for sign in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        for form in (markdown, latex, comma_separated):
            assert sign not in form(["a", "b"], [[f"x{sign}y", "12.3"]])


def test_a_name_that_begins_like_an_argument_of_a_latex_command() -> None:
    r"""\\ and \midrule take [1] for a length and fail; a form feed is \par, which a tabular's row
    must not have."""
    text = latex(["*a", "b"], [["[1] a", "1"], ["*x\f\ry", "2"]])
    assert [line.split(" & ")[0] for line in text.splitlines() if " & " in line] == ["{*}a", "{[}1] a", "{*}x  y"]


def test_a_name_is_no_formula_in_a_spreadsheet() -> None:
    text = comma_separated(["=a", "b"], [["-1.5", "+2"], ["@x", "-x"], ['=HYPERLINK("a")', "1=2"]])
    assert [*csv.reader(io.StringIO(text))] == [
        ["'=a", "b"],
        ["-1.5", "+2"],
        ["'@x", "'-x"],
        ['\'=HYPERLINK("a")', "1=2"],
    ]
    for name in ("\t=1", "\r@x", " +x", "\uff1d1", "\n-x"):
        (row,) = csv.reader(io.StringIO(comma_separated([name], [])))
        assert row == [f"'{' ' if name[0].isspace() else ''}{name.strip()}"]
