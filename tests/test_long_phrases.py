"""Phrases as people type them: longer than the model reads, in quotes, with a full stop."""

import dataclasses
import io
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris import Segmenter
from dcris.cli import main
from dcris.config import DataConfig, replace
from dcris.data.cleaning import clean_text
from dcris.data.dataset import ImageTasks, TrainingSamples, all_queries
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.data.tokenizer import PADDING, cut_texts, get_tokenizer, tokenize, unread_end
from dcris.errors import LongPhraseWarning
from dcris.inference.export_onnx import _tokenizer_settings
from dcris.inference.web.app import _render, _rows
from dcris.training.trainer import build_model
from runs import quick_config
from servers import post
from test_export import example
from test_web import served

LENGTH = 9
LONG = "the small red circle on the left side of the big blue star"
END = "side of the big blue star"
DATA = DataConfig(word_length=LENGTH)
NAMES = ["tiny", "clip"]

TYPED = st.one_of(
    st.lists(st.sampled_from(["left", "cup", "it's", "größer", '"', "'", ".", "“no”", "U.S.", "...", "&quot;"])).map(
        " ".join
    ),
    st.builds(
        lambda text, marks: marks[0] + text + marks[1],
        st.sampled_from(["left cup", "the dog's bone", '"a" or "b"', "", " x ", LONG]),
        st.sampled_from(['""', "''", "``", "“”", '".', " .", "..", ('"', '."'), ('"', '".')]),
    ),
    st.text(max_size=12),
)


def tokenizer_called(name: str) -> Any:
    if name == "clip":
        pytest.importorskip("instant_clip_tokenizer")
    return get_tokenizer(name)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ('"left man"', "left man"),
        ("“Left man.” ", "left man"),
        ('"left man".', "left man"),
        ("left man.", "left man"),
        ("`cup`", "cup"),
        ("'the dog's bone'", "the dog's bone"),
        ("&quot;cup&quot;", "cup"),
        ("'\"cup\"'", "cup"),
        ('"left" or "right"', '"left" or "right"'),
        ("'dogs' and 'cats'", "'dogs' and 'cats'"),
        ('sign with "stop"', 'sign with "stop"'),
        ("left man...", "left man..."),
        ("left man!", "left man!"),
        ('"', '"'),
        (".", "."),
        ('"."', "."),
    ],
)
def test_what_is_stripped(typed: str, read: str) -> None:
    """Only marks around the whole phrase go, and no phrase becomes empty."""
    assert clean_text(typed, strip=True) == read
    assert clean_text(typed) == clean_text(clean_text(typed))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_without_torch_reads_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX example has its own cleaning; another token would give another mask."""
    tokenizer = tokenizer_called(name)
    told = json.loads(json.dumps(_tokenizer_settings(tokenizer)))
    if name == "clip":  # which the example makes anew for each call, in a tenth of a second
        library = pytest.importorskip("instant_clip_tokenizer")
        monkeypatch.setattr(library, "Tokenizer", cache(library.Tokenizer))

    @settings(max_examples=50)
    @given(typed=TYPED)
    def check(typed: str) -> None:
        for strip in (True, False):
            expected = tokenizer([typed], LENGTH, strip=strip).numpy()
            np.testing.assert_array_equal(example().tokenize([typed], LENGTH, strip, **told), expected)

    check()


@pytest.mark.parametrize("name", NAMES)
@given(typed=st.lists(TYPED, min_size=1, max_size=4), predicting=st.booleans())
@settings(max_examples=50)
def test_the_unread_end_is_what_does_not_fit(name: str, typed: list[str], predicting: bool) -> None:
    """A phrase is called too long exactly if the tokenizer cuts it, and its end begins at the first
    word that is not read completely."""
    tokenizer = tokenizer_called(name)
    full = tokenizer(typed, 60, strip=predicting)
    expected = {text for text, row in zip(typed, full, strict=True) if row[LENGTH] != PADDING}
    assert set(cut_texts(typed, DATA, tokenizer, predicting=predicting)) == expected
    for text in expected if predicting else ():
        cleaned, end = clean_text(text, strip=True), unread_end(text, DATA, tokenizer)
        assert end and cleaned.endswith(end)
        read = cleaned.removesuffix(end).strip()
        assert (tokenizer([read], 60)[0, LENGTH:] == PADDING).all()
        one_more = tokenizer([f"{read} {end.split(' ')[0]}"], 60)[0]
        assert one_more[LENGTH] != PADDING


def test_a_very_long_phrase_costs_no_more_than_reading_it() -> None:
    """Anyone may paste a book; the words are not counted again and again."""
    book = "the red circle, " * 30_000
    end = unread_end(book, DATA, get_tokenizer("tiny"))
    assert len(book) - len(end) < 60


@pytest.mark.parametrize("strip", ["predict", "always", "never"])
def test_training_and_evaluation_read_expressions_as_they_are(tmp_path: Path, strip: Any) -> None:
    """Published scores need every mark; only the named setting changes that."""
    table = load_references(write_scenes(tmp_path, train=1, val=0, test=0, side=56), "scenes")
    typed = '"red circle."'
    reference = table.split("train")[0]
    expressions = tuple(dataclasses.replace(each, text=typed) for each in reference.expressions)
    reference = dataclasses.replace(reference, expressions=expressions)
    config = quick_config(1, ("data.strip_phrases", strip)).data
    tokenizer = get_tokenizer("tiny")
    plain, bare = (tokenizer([text], config.word_length)[0] for text in (typed, "red circle"))
    expected = bare if strip == "always" else plain
    sample = TrainingSamples([reference], config, tokenizer, 0)[0]
    assert torch.equal(sample.tokens, expected)
    task = ImageTasks(all_queries([reference]), config, tokenizer)[0]
    assert torch.equal(task.tokens[0], expected)
    predicted = tokenize([typed], config, tokenizer, predicting=True)[0]
    assert torch.equal(predicted, plain if strip == "never" else bare)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    # A positive bias of the masks, so that none is empty.
    config = quick_config(
        1, ("data.word_length", str(LENGTH)), ("train.precision", '"float32"'), ("model.head.bias", "1.5")
    )
    return Segmenter(build_model(config), config, device="cpu")


@pytest.fixture(scope="module")
def saved(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


def test_python_warns_once_a_phrase(segmenter: Segmenter) -> None:
    """One sentence that names the part without effect, at the caller's line."""
    for predict in (
        lambda: segmenter.predict(picture(), [LONG, "red circle", LONG]),
        lambda: segmenter.predict([picture(), picture()], [LONG, "red circle"])[1],
        lambda: segmenter.segment(segmenter.encode_image(picture()), [LONG, "red circle"]),
    ):
        with pytest.warns(LongPhraseWarning) as caught:
            predictions = predict()
        assert [str(each.message) for each in caught] == [
            f"{LONG!r} is longer than the model reads; its end is ignored: {END!r}"
        ]
        assert caught[0].filename == __file__
        assert [each.unread for each in predictions][:2] == [END, None]
        assert predictions[0].to_coco()["unread"] == END
        assert "unread" not in predictions[1].to_coco()


def test_the_unread_end_has_no_effect(segmenter: Segmenter) -> None:
    """What is said to be ignored is ignored; quotes and the full stop are, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongPhraseWarning)
        one, other, third = (
            segmenter.predict(picture(), text, scores=True)[0].probabilities
            for text in (LONG, LONG.replace(END, "end of a green ring"), f'"{LONG}."')
        )
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, third)
    (plain,), (marked,) = (segmenter.predict(picture(), text) for text in ("Red circle", "“Red circle.”"))
    assert 0 < plain.score == marked.score
    assert marked.phrase == "“Red circle.”"
    assert plain.unread is marked.unread is None
    never = Segmenter(segmenter.model, replace(segmenter.config, {"data.strip_phrases": "never"}), device="cpu")
    assert never.predict(picture(), "“Red circle.”")[0].score != plain.score


def test_the_command_says_it_once(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a folder of images it is one line, and the entry of each result has the end."""
    for name in ("a", "b"):
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    command = ["predict", str(saved), str(tmp_path / "*.png"), "--device", "cpu", "--format", "coco"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*command, "-e", LONG, "-e", "ring.", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("longer than the model reads") == 1
    assert f"{LONG!r} is longer than the model reads; its end is ignored: {END!r}" in printed.out
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry.get("unread") for entry in entries] == [END, None] * 2
    many = [word for number in range(7) for word in ("-e", f"{LONG} {number}")]
    assert main([*command, *many, "--out", str(tmp_path / "many")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("its end is ignored") == 5
    assert "2 more phrases are longer than the model reads" in printed.out


def test_the_page_and_the_api_say_it(segmenter: Segmenter, tmp_path: Path) -> None:
    """A visitor sees it beside the phrase, a program in a field; the server's log has nothing."""
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "PNG")
    with served(segmenter, tmp_path) as address:
        found = post(address, stream.getvalue(), phrase=[LONG, "red circle"])
    assert [each.get("unread") for each in found] == [END, None]
    with pytest.warns(LongPhraseWarning):
        predictions = segmenter.predict(picture(), [LONG, "red circle"], scores=True)
    legend = _render("legend", _rows([each.with_threshold(0.5) for each in predictions]))
    assert legend.count(f"its end is ignored: {END}") == 1


def test_results_of_a_model_that_always_strips_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of other expressions than the published ones must not pass for comparable."""
    root = write_scenes(tmp_path / "data", train=0, val=0, test=1, side=56)
    for strip in ("predict", "always"):
        config = quick_config(1, ("data.strip_phrases", strip))
        model = Segmenter(build_model(config), config, device="cpu").save_pretrained(tmp_path / strip)
        assert main(["evaluate", str(model), "--data", str(root), "--split", "test", "--device", "cpu"]) == 0
        assert ("strip_phrases" in json.loads(capsys.readouterr().out)) == (strip == "always")
