"""Comparison of systems: tables, figures and the command."""

import base64
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import TinyRefer
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation.compare import as_latex, as_text, chosen_examples, compare, name_systems, select_examples
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import STANDARD_METRICS, Overlap
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.report.comparison_report import write_comparison_report
from dcris.evaluation.report.figure import draw, figure_page, pdf_bytes, row_page, write_figures
from dcris.evaluation.report.panels import CELL, PREDICTION_COLOUR, TRUTH_COLOUR, NamedMask, Panel
from dcris.evaluation.report.vector_pdf import vector_pdf
from dcris.evaluation.results import write_results
from latex import compile_latex, needs_pdflatex
from made_results import drawn_result, made_result, rectangle
from pages import Page
from runs import leftovers, quick_config, run_training

CRIS = get_protocol("cris")
EVIL = '<script>alert("1")</script>\'&<img src=x onerror=alert(1)>'


def dcris(*words: object) -> int:
    """Run one command in this process."""
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def other_run(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run for even fewer steps than trained_run."""
    out = tmp_path_factory.mktemp("run") / "other"
    run_training(quick_config(2), scenes_root, out)
    return out


@pytest.fixture(scope="module")
def answers(trained_run: Path, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dcris evaluate --answers` writes of trained_run; nobody may change it."""
    path = tmp_path_factory.mktemp("answers") / "one.jsonl"
    where = ("--data", scenes_root, "--split", "test", "--device", "cpu")
    assert dcris("evaluate", trained_run, *where, "--answers", path) == 0
    return path


def rescored(results: Sequence[EvalResult], shares: Sequence[int]) -> list[EvalResult]:
    """Return another system's results on the same expressions, with these intersections."""
    return [
        replace(each, overlap=Overlap(share, each.overlap.union)) for each, share in zip(results, shares, strict=True)
    ]


# ---- from the command line -----------------------------------------------------------------------


def test_two_runs_and_their_results_files(
    trained_run: Path, other_run: Path, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The models give a page and paper figures; their results files give the same comparison
    without the models."""
    where = ("--data", scenes_root, "--split", "test", "--device", "cpu")
    page, images = tmp_path / "results" / "compare.html", tmp_path / "images"
    words = ("compare", trained_run, other_run, *where, "--names", "DCRIS", EVIL, "--out", page, "--images", images)
    assert dcris(*words, "--count", 4, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in printed["systems"]] == ["DCRIS", EVIL]
    ours, theirs = printed["systems"]
    (gap,) = printed["differences"]
    assert gap["miou"] == pytest.approx(theirs["miou"] - ours["miou"])
    assert sum(group["expressions"] for group in gap["by_kind"]) == printed["expressions"]
    read = Page(page.read_text())
    assert read.is_self_contained()
    assert EVIL in read.text()
    assert f"Measured on {printed['expressions']} expressions" in read.text()
    assert len(read.images()) == 4 * 4
    names = sorted(path.name for path in images.iterdir())
    assert len(names) == 4 + 3
    assert names[-3:] == ["figure.pdf", "figure.png", "figure.tex"]
    rows = [Image.open(images / name) for name in names[:4]]
    assert {image.width for image in (*rows, Image.open(images / "figure.png"))} == {4 * CELL + 5 * 20}

    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for run, file in zip((trained_run, other_run), files, strict=True):
        assert dcris("evaluate", run, *where, "--answers", file) == 0
    capsys.readouterr()
    given = (*where, "--dataset", "scenes", "--names", "DCRIS", EVIL, "--json")
    assert dcris("compare", *files, *given) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert dcris("compare", trained_run, files[1], *given) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert not leftovers(tmp_path)


def test_real_images_and_expressions(
    refer_root: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey and colour images of any shape, and masks as polygons, in pages and figures."""
    references = load_references(refer_root, "refcoco").split("val")
    results = [
        drawn_result(reference, number, mask, mask)
        for reference in references
        for number in range(len(reference.expressions))
        for mask in [rectangle(reference.image_size, 5, 5, 50, 60)]
    ]
    write_results(tmp_path / "boxes.jsonl", results, CRIS)
    write_results(tmp_path / "worse.jsonl", rescored(results, [0] * len(results)), CRIS)
    where = ("--data", refer_root, "--dataset", "refcoco", "--split", "val", "--out", tmp_path / "page.html")
    assert dcris("compare", tmp_path / "boxes.jsonl", tmp_path / "worse.jsonl", *where) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["boxes", "worse", "worse", "-", "boxes"]
    assert table[1].split() == [
        "mIoU",
        "100.0",
        "[100.0,",
        "100.0]",
        "0.0",
        "[0.0,",
        "0.0]",
        "-100.0",
        "[-100.0,",
        "-100.0]",
    ]
    assert len(Page((tmp_path / "page.html").read_text()).images()) >= 4 * 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("RUN", "one system alone"),
        ("", "SYSTEM"),
        ("RUN RUN", "--names"),
        ("RUN A.jsonl --names one", "2 systems and 1 names"),
        ("RUN A.jsonl --names x x", "--names"),
        ("RUN ABSENT", "no checkpoint"),
        ("RUN ABSENT.jsonl", "there is no file"),
        ("RUN B.jsonl", "no result for sentence"),
        ("RUN A.jsonl --split train", "no result for sentence"),
        ("RUN A.jsonl --split dev", "'dev'"),
        ("RUN A.jsonl --protocol fast", "fast"),
        ("RUN A.jsonl --count some", "some"),
        ("RUN A.jsonl --count -1", "-1"),
        (
            "RUN A.jsonl --images ABSENT --sent-ids 99999999",
            "no expression that was compared has the sentence id 99999999",
        ),
        ("RUN A.jsonl --images ABSENT --phrases nothing", "'nothing'"),
        ("RUN A.jsonl --images ABSENT --rows 99", "there is no row 99"),
        ("RUN A.jsonl --rows 1 --phrases cup", "--rows"),
        ("RUN A.jsonl --out A.jsonl/page.html", "cannot write"),
        ("RUN A.jsonl --images A.jsonl", "cannot write"),
        ("A.jsonl C.jsonl", "--dataset"),
        ("A.jsonl C.jsonl --dataset nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    words: str,
    sentence: str,
    trained_run: Path,
    scenes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code is 2, and no file looks like a result."""
    results = [
        drawn_result(reference, number, mask, mask)
        for reference in load_references(scenes_root, "scenes").split("test")
        for number in range(len(reference.expressions))
        for mask in [rectangle(reference.image_size, 0, 0, 9, 9)]
    ]
    write_results(tmp_path / "A.jsonl", results, CRIS)
    write_results(tmp_path / "C.jsonl", results, CRIS)
    write_results(tmp_path / "B.jsonl", results[:-1], CRIS)
    places = {"RUN": trained_run, "ABSENT": tmp_path / "absent"}
    given = [str(places.get(word, tmp_path / word if ".jsonl" in word else word)) for word in words.split()]
    before = set(tmp_path.rglob("*"))
    split = () if "--split" in words else ("--split", "test")
    assert dcris("compare", *given, "--data", scenes_root, *split, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 0.5}, "'threshold 0.35' and 'threshold 0.5'"),
        ({"refine": "guided"}, "no refine and 'refined, guided'"),
        ({"refine": "\x1b[31m" + "guided" * 100}, r"'refined, \x1b[31mguided"),
        ({"refine": "guided" * 1000}, "line 1 has a 'refine' of 6,000 characters; the limit is 1,000"),
        ({"protocol": "\x1b[31m"}, r"measured by protocol '\x1b[31m'"),
        ({"threshold": "high"}, "line 1 has no number as 'threshold'"),
    ],
)
def test_results_of_other_settings_do_not_compare(
    change: dict[str, Any],
    words: str,
    trained_run: Path,
    answers: Path,
    scenes_root: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """Refined edges or a fitted threshold would look like a gain of the same weights."""
    where = ("--data", scenes_root, "--split", "test", "--device", "cpu")
    one, other = answers, tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in one.read_text().splitlines()]
    other.write_text("\n".join(json.dumps(line | change) for line in lines))
    for first in (one, trained_run):
        capsys.readouterr()
        assert dcris("compare", first, other, *where, "--dataset", "scenes") == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error) < 500
    # Files of before it was recorded compare, as they did.
    other.write_text("\n".join(json.dumps({key: line[key] for key in line if key != "threshold"}) for line in lines))
    assert dcris("compare", one, other, *where, "--dataset", "scenes") == 0


def test_a_wrong_file_is_found_before_a_model_runs(
    trained_run: Path, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a file is reported before a model runs, which may take hours."""

    def work(*args: object, **kwargs: object) -> Iterator[EvalResult]:
        raise AssertionError

    monkeypatch.setattr("dcris.evaluation.compare.predict_queries", work)
    (tmp_path / "a.jsonl").write_text("{}")
    assert dcris("compare", trained_run, tmp_path / "a.jsonl", "--data", scenes_root, "--split", "test") == 2


# ---- names, figures, and what is shown -----------------------------------------------------------


def test_systems_are_named_by_their_paths() -> None:
    """Names are the last parts of the paths where they differ, else whole paths."""
    assert name_systems(["runs/a", "out/b.jsonl", "me/model"]) == ["a", "b", "model"]
    dots = ["runs/lr0.01", "lr0.001/", "me/model@v1.5", "b-1.5.safetensors"]
    assert name_systems(dots) == ["lr0.01", "lr0.001", "model@v1.5", "b-1.5"]
    assert name_systems(["one/run", "two/run"]) == ["one/run", "two/run"]
    assert name_systems(["a", "b"], ["ours ", "fixed"]) == ["ours", "fixed"]
    for sources, names in ((["a", "a"], []), (["a", "b"], ["", "x"]), (["a"], []), (["a", "b", "c"], ["x", "y"])):
        with pytest.raises(DcrisError):
            name_systems(sources, names)


def test_scores_by_hand() -> None:
    """Each system's own scores, and the others minus the first, in the same groups."""
    ours = [made_result((1, 2), image=1), made_result((3, 4), image=2, expression="red cup in the back row of shelves")]
    theirs = rescored(ours, [1, 2])
    found = compare({"ours": ours, "theirs": theirs})
    assert (found["references"], found["expressions"]) == (2, 2)
    assert [each["miou"] for each in found["systems"]] == [62.5, 50.0]
    (gap,) = found["differences"]
    assert (gap["name"], gap["minus"], gap["miou"]) == ("theirs", "ours", -12.5)
    assert gap["oiou"] == pytest.approx(100 * (3 / 6 - 4 / 6))
    assert gap["intervals"]["miou"] == [-25, 0]
    assert [(group["name"], group["miou"]) for group in gap["by_length"]] == [("1-2 words", 0), ("6-10 words", -25)]
    json.dumps(found, allow_nan=False)
    lines = as_latex(found).splitlines()
    assert r"ours & \textbf{62.5} & " in lines[4]
    assert lines[6] == r"\midrule"
    assert lines[7].startswith("theirs - ours & -12.5 [-25.0, +0.0] & ")
    table = as_text(found).splitlines()
    assert len(table) == 1 + len(STANDARD_METRICS)
    assert len({len(line) for line in table}) == 1
    assert len(as_text(compare({"our\ns": ours, "theirs": theirs})).splitlines()) == len(
        table
    )  # as a file may be named


@pytest.mark.parametrize("count", [0, 1])
def test_few_or_no_results(count: int, tmp_path: Path) -> None:
    """One result gives no interval and no results give no example, but both give a page."""
    results = [made_result((0, 0)) for _ in range(count)]
    systems = {"a": results, "b": results, "c": results}
    found = compare(systems)
    json.dumps(found, allow_nan=False)
    assert as_text(found).count("0.0") == (5 * (len(STANDARD_METRICS) - 1) if count else 0)  # oIoU is 0 / 0
    assert sum(len(some) for some in select_examples(systems, 6).values()) == count
    write_comparison_report(tmp_path / "a.html", title="x", comparison=found, measured={}, panels={})
    assert "minus a" in Page((tmp_path / "a.html").read_text()).text()


def test_examples_differ_both_ways_and_some_are_random() -> None:
    """Examples show wins, losses and random expressions, on distinct images."""
    ours = [made_result((50, 100), image=number // 4) for number in range(80)]
    theirs = rescored(ours, range(0, 80))  # below ours in the first 50, above in the last 29
    shown = select_examples({"ours": ours, "theirs": theirs}, 9)
    assert list(shown) == ["ours furthest ahead of theirs", "ours furthest behind theirs", "Drawn at random"]
    ahead, behind, chance = ([row["theirs"].overlap.intersection for row in rows] for rows in shown.values())
    assert ahead == [0, 4, 8]
    assert behind == [79, 75, 71]
    assert len({share // 4 for share in chance}) == 3
    assert not set(chance) & {*ahead, *behind}
    for rows in shown.values():
        assert all(row["ours"].expression == row["theirs"].expression for row in rows)
    assert select_examples({"ours": ours, "theirs": theirs}, 9) == shown
    three = select_examples({"ours": ours, "theirs": theirs, "best": rescored(ours, [100] * 80)}, 2)
    assert list(three) == ["ours furthest behind the others", "Drawn at random"]


def test_rows_are_chosen_by_sentence_by_text_or_by_number() -> None:
    """For a figure after a first look: in the order given, and everything else is left out."""
    ours = [made_result((50, 100), image=number, expression=f"cup {number % 4}") for number in range(12)]
    systems = {"ours": ours, "theirs": rescored(ours, range(12))}

    def shown(**choice: object) -> list[EvalResult]:
        ((heading, rows),) = chosen_examples(systems, **choice).items()
        assert heading == "Chosen"
        assert all(row["ours"].expression == row["theirs"].expression for row in rows)
        return [row["ours"] for row in rows]

    assert shown(sent_ids=[ours[7].expression.sent_id, ours[2].expression.sent_id]) == [ours[7], ours[2]]
    assert shown(phrases=[" CUP  3", "cup 0"]) == [ours[3], ours[7], ours[11], ours[0], ours[4], ours[8]]
    assert shown(phrases=["cup 3"], count=2) == [ours[3], ours[7]]
    drawn = [row["ours"] for rows in select_examples(systems, 6).values() for row in rows]
    assert shown(rows=[5, 1], count=6) == [drawn[4], drawn[0]]
    assert chosen_examples(systems, count=6) == select_examples(systems, 6)
    for choice, problem in (({"sent_ids": [10**6]}, "1000000"), ({"phrases": ["cat"]}, "cat"), ({"rows": [9]}, "9")):
        with pytest.raises(DcrisError, match=problem):
            chosen_examples(systems, **choice)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 1000])
def test_examples_of_equal_systems_are_random(count: int) -> None:
    """If no system is ahead, all examples are random."""
    results = [made_result((1, 2), image=number) for number in range(20)]
    shown = select_examples({"a": results, "b": results}, count)
    assert set(shown) <= {"Drawn at random"}
    assert sum(map(len, shown.values())) == min(count, 20)


# ---- page and figures ----------------------------------------------------------------------------


def test_only_significant_differences_are_coloured(tmp_path: Path) -> None:
    """Only differences whose interval excludes 0 are coloured."""
    ours = [made_result((50, 100), image=number) for number in range(40)]
    better, mixed = rescored(ours, range(51, 91)), rescored(ours, [10, 90] * 20)
    path = tmp_path / "page.html"
    write_comparison_report(
        path, title=EVIL, comparison=compare({EVIL: ours, "up": better, "same": mixed}), measured={}, panels={}
    )
    page = Page(path.read_text())
    assert not page.named("script")
    assert EVIL in page.text()
    colours = [attrs["class"] for attrs in page.named("span") if attrs.get("class", "").startswith("change")]
    rows = len(STANDARD_METRICS) + 3  # and one group each of length, size and kind
    assert colours[0::2][:2] == ["change good"] * 2
    assert colours[1::2][:2] == ["change"] * 2
    assert len(colours) == 2 * rows


def panel(*names: str, expression: str = "left one", size: tuple[int, int] = (300, 400), truth: bool = True) -> Panel:
    """Return a grey panel with the truth on the left and each prediction further right."""
    masks = [rectangle(size, 50, 20 + 60 * number, 150, 70 + 60 * number) for number in range(len(names) + 1)]
    predictions = tuple(NamedMask(name, mask, 0.5) for name, mask in zip(names, masks[1:], strict=True))
    return Panel(np.full((*size, 3), 128, np.uint8), expression, masks[0] if truth else None, predictions)


def test_a_row_shows_each_mask_in_its_column() -> None:
    """Each mask is in the column of its system."""
    shown = draw(row_page(panel("a", "b")))
    assert shown.shape[1] == 4 * (CELL + 20) + 20
    for column, colour in enumerate((None, TRUTH_COLOUR, PREDICTION_COLOUR, PREDICTION_COLOUR)):
        left = 20 + column * (CELL + 20)
        part = shown[:, left : left + CELL].astype(int)
        for other in (TRUTH_COLOUR, PREDICTION_COLOUR):
            tint = np.abs(part - (128 * 0.55 + np.array(other) * 0.45)).max(axis=2) < 3
            assert tint.any() == (other is colour)
            if other is colour:
                place = np.flatnonzero(tint.any(axis=0)).mean() - (CELL - 400) / 2
                assert place == pytest.approx(45 + 60 * max(0, column - 1), abs=2)


@pytest.mark.parametrize(
    "phrase",
    [
        "",
        " ",
        "a\nb\x00c",
        "\ud800",
        "word " * 500,
        "w" * 5000,
        "\N{CJK UNIFIED IDEOGRAPH-5DE6}\N{HEBREW LETTER ALEF}",
        EVIL,
    ],
)
def test_any_phrase_and_any_shape_fit(phrase: str) -> None:
    """Nothing reaches the page's edges, and text that is too long is cut."""
    for size in ((160, 500), (700, 160), (112, 112)):
        for predictions in (("a",), (phrase, "b", "c")):
            shown = draw(row_page(panel(*predictions, expression=phrase, size=size, truth=len(predictions) > 1)))
            assert shown.dtype == np.uint8
            assert (shown[:, :8] == 255).all() and (shown[:, -8:] == 255).all()
            assert (shown[-4:] == 255).all()
            assert shown.shape[0] < 900


def test_a_figure_is_its_rows_and_a_foot() -> None:
    """Names are once below the columns, as in the paper's figure 4."""
    panels = [panel("a", "b"), panel("a", "b", size=(500, 300))]
    shown = draw(figure_page(panels))
    heights = [row_page(each, names=False).height for each in panels]
    np.testing.assert_array_equal(shown[: heights[0]], draw(row_page(panels[0], names=False)))
    assert 40 < len(shown) - sum(heights) < 150
    assert (shown[sum(heights) :] < 100).any()
    with pytest.raises(ValueError, match="at least one"):
        figure_page([])
    assert pdf_bytes(shown).startswith(b"%PDF")


# ---- PDF -----------------------------------------------------------------------------------------


def streams(pdf: bytes) -> list[bytes]:
    """Return the streams of a PDF that are compressed as text is."""
    found = []
    for part in re.findall(rb"stream\r?\n(.*?)\r?\n?endstream", pdf, re.DOTALL):
        with suppress(Exception):
            text = part.strip().endswith(b"~>")
            packed = base64.a85decode(part.strip().removesuffix(b"~>")) if text else part
            found.append(zlib.decompress(packed))
    return found


def test_text_and_outlines_of_a_pdf_are_vectors() -> None:
    """Printed larger, a figure stays sharp, and a reader finds its words. The photograph is there
    once for its four columns."""
    pytest.importorskip("reportlab")
    photograph = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    shown = replace(panel("a", "b"), image=photograph)
    page = figure_page([shown])
    found = vector_pdf(page, 300)
    assert found == vector_pdf(page, 300)
    assert found.count(b"/Subtype /Image") == 1
    assert b"/FontFile2" in found  # embedded, as publishers ask
    content = max(streams(found), key=lambda part: part.count(b" l "))
    assert content.count(b" Do") == 4
    assert content.count(b"f*") == 3  # a tint for each mask
    assert content.count(b" Tj") == len(page.lines)
    opacity, kept, at_images = "", [], []
    for operator in re.findall(rb"/gRLs\d+ gs|\bq\b|\bQ\b|/\S+ Do", content):
        if operator == b"q":
            kept.append(opacity)
        elif operator == b"Q":
            opacity = kept.pop()
        elif operator.endswith(b"gs"):
            opacity = operator.decode()
        else:
            at_images.append(opacity)
    assert at_images == [""] * 4  # the tint does not make the next image pale


@pytest.mark.parametrize(
    "phrase", ["", "\ud800 a\x00b", "\N{CJK UNIFIED IDEOGRAPH-5DE6}\N{HEBREW LETTER ALEF}", "$x_1$ (a) \\"]
)
def test_any_phrase_gives_a_pdf(phrase: str) -> None:
    pytest.importorskip("reportlab")
    empty = replace(panel("a", "b", expression=phrase), truth=np.zeros((300, 400), bool))
    assert vector_pdf(figure_page([empty]), 300).rstrip().endswith(b"%%EOF")


def test_without_reportlab_the_pdf_has_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "reportlab.pdfgen.canvas", None)
    write_figures(tmp_path, [("1", panel("a", "b"))])
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert "dcris[figures]" in capsys.readouterr().err


@pytest.mark.slow
@needs_pdflatex
def test_the_float_and_the_table_compile(tmp_path: Path) -> None:
    write_figures(tmp_path, [("1", panel(EVIL, "b_%", expression=r"50% of {a} \b & c_d #1"))], r"ref_coco & val")
    document = r"\documentclass{article}\usepackage{graphicx}\begin{document}\input{figure.tex}\end{document}"
    assert compile_latex(tmp_path, document).stat().st_size > 10_000


def test_a_figure_of_generated_scenes_and_others(tiny_refer: TinyRefer, tmp_path: Path) -> None:
    """Images of 30 pixels are enlarged by a whole factor."""
    tiny_refer.write()
    reference = load_references(tiny_refer.root, "tiny").split("val")[0]
    mask = rectangle(reference.image_size, 3, 3, 9, 9)
    systems = {name: [drawn_result(reference, number, mask, mask) for number in (0, 1)] for name in "ab"}
    for name, results in systems.items():
        write_results(tmp_path / f"{name}.jsonl", results, CRIS)
    words = ("--data", tiny_refer.root, "--dataset", "tiny", "--images", tmp_path / "images")
    assert dcris("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *words) == 0
    content = (tmp_path / "images" / "figure.png").read_bytes()
    assert Image.open(io.BytesIO(content)).width == 4 * CELL + 5 * 20
    assert (
        dcris("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *words[:-1], tmp_path / "none", "--count", 0) == 0
    )
    assert not (tmp_path / "none").exists()
