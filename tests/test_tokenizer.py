import html
import json
import pickle
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HubTokenizer
from tokenizers.models import BPE

from dcris.data import tokenizer as module
from dcris.data.cleaning import clean_text, is_blank, require_phrase
from dcris.data.table import check_text
from dcris.data.tokenizer import (
    CLIP_END,
    CLIP_REPOSITORY,
    CLIP_START,
    TINY_BUCKETS,
    ClipTokenizer,
    TinyTokenizer,
    Tokenizer,
    get_tokenizer,
    tokenizer_of,
)
from dcris.errors import DcrisError
from dcris.recipes import get_recipe

GOLDEN = json.loads((Path(__file__).parent / "golden" / "clip_tokens.json").read_text())
WORDS = ["the", "red", "circle", ","]
needs_instant = pytest.mark.skipif(sys.version_info >= (3, 13), reason="instant-clip-tokenizer has no wheel for it")


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


def hub_file(path: Path, start: int = CLIP_START, end: int = CLIP_END) -> Path:
    """A small vocabulary in the form of CLIP's tokenizer.json: single letters, "re" and "red"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    tokenizer = HubTokenizer(
        BPE(
            vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")], end_of_word_suffix="</w>", unk_token="<|endoftext|>"
        )
    )
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", end), ("<|startoftext|>", start))
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.enable_truncation(4)  # settings of the file must have no effect
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["clip", "hub", "tiny"])
def tokenizer(request, tmp_path) -> Tokenizer:
    if request.param == "clip":
        if sys.version_info >= (3, 13):
            pytest.skip("instant-clip-tokenizer has no wheel for it")
        return ClipTokenizer()
    if request.param == "hub":
        return ClipTokenizer(hub_file(tmp_path / "tokenizer.json"))
    return TinyTokenizer(WORDS)


@needs_instant
@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: ascii(entry["text"][:30]))
def test_clip_tokens_are_those_of_transformers(entry):
    assert ClipTokenizer()([entry["text"]], 77)[0].tolist() == padded(entry["ids"], 77)


@needs_instant
def test_special_names_count_only_where_a_token_starts():
    # ids from OpenAI's simple_tokenizer.py; transformers and tokenizers convert the names anywhere
    rows = ClipTokenizer()(["!<|endoftext|>", "a<|endoftext|>'s"], 8).tolist()
    assert rows[0][1] != CLIP_END
    assert 40786 in rows[0]
    assert rows[1] == [CLIP_START, 320, CLIP_END, 568, CLIP_END, 0, 0, 0]


def test_the_hub_file_is_read_without_its_own_framing(tmp_path):
    tokenizer = ClipTokenizer(hub_file(tmp_path / "tokenizer.json"))
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    rows = tokenizer(["RED  re's &lt;|endoftext|&gt;", "red " * 9], 8).tolist()
    red = ids["red</w>"]
    assert rows[0] == [CLIP_START, red, ids["r"], ids["e</w>"], ids["'"], ids["s</w>"], CLIP_END, CLIP_END]
    assert rows[1] == [CLIP_START, *[red] * 6, CLIP_END]


@pytest.mark.parametrize("content", ["", "{}", "not json", None], ids=["empty", "no model", "no json", "missing"])
def test_a_bad_hub_file_is_one_plain_sentence(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DcrisError, match=r"tokenizer\.json"):
        ClipTokenizer(file)(["red"], 5)


def test_another_models_vocabulary_is_refused(tmp_path):
    with pytest.raises(DcrisError, match="600 and 601"):
        ClipTokenizer(hub_file(tmp_path / "tokenizer.json", 600, 601))(["red"], 5)


def test_a_missing_library_is_reported_with_advice(monkeypatch):
    module._clip_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    with pytest.raises(DcrisError, match=r"tokenizer\.json.*3\.11"):
        ClipTokenizer()(["red"], 5)


def test_without_the_library_the_hubs_vocabulary_is_used(hub, monkeypatch, tmp_path):
    """There is no wheel of the library for Python 3.13, where models on CLIP must work, too."""
    hub.push(CLIP_REPOSITORY, {"tokenizer.json": hub_file(tmp_path / "tokenizer.json").read_bytes()})
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    get_tokenizer.cache_clear()
    try:
        expected = ClipTokenizer(tmp_path / "tokenizer.json")(["red circle"], 9)
        assert torch.equal(get_tokenizer("clip")(["red circle"], 9), expected)
        hub.stop()
        get_tokenizer.cache_clear()
        assert torch.equal(get_tokenizer("clip")(["red circle"], 9), expected)  # from the cache
    finally:
        get_tokenizer.cache_clear()


def test_shape_cut_and_empty_text(tokenizer):
    rows = tokenizer(["red", "", "red " * 200], 6)
    assert rows.dtype == torch.int64
    assert rows.shape == (3, 6)
    start, end = rows[0, 0].item(), tokenizer.end_token
    assert rows[1].tolist() == [start, end, 0, 0, 0, 0]
    assert rows[2, -1] == end
    assert (rows[2, :-1] != end).all()
    assert tokenizer([], 6).shape == (0, 6)
    assert tokenizer(["red circle"], 2).tolist() == [[start, end]]
    with pytest.raises(DcrisError, match="text length is 1"):
        tokenizer(["red"], 1)
    with pytest.raises(TypeError):
        tokenizer("red", 6)


def test_workers_and_threads_see_the_same_ids(tokenizer):
    texts = [f"the red circle {number}" for number in range(50)]
    expected = tokenizer(texts, 17)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy(texts, 17), expected)
    assert (copy.name, copy.vocabulary_size, copy.end_token) == (
        tokenizer.name,
        tokenizer.vocabulary_size,
        tokenizer.end_token,
    )
    module._clip_backend.cache_clear()  # so that the threads compete for the first use
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(rows, expected) for rows in pool.map(lambda _: tokenizer(texts, 17), range(32)))


@given(st.lists(st.text(max_size=40), min_size=1, max_size=3), st.integers(2, 30))
@settings(max_examples=60)
@pytest.mark.parametrize("kind", [pytest.param("clip", marks=needs_instant), "tiny"])
def test_any_text_becomes_a_well_formed_row(kind, texts, length):
    tokenizer = ClipTokenizer() if kind == "clip" else TinyTokenizer(WORDS)
    rows = tokenizer(texts, length)
    assert rows.shape == (len(texts), length)
    assert rows.min() >= 0
    assert rows.max() < tokenizer.vocabulary_size
    for row, text in zip(rows, texts, strict=True):
        last = int((row == tokenizer.end_token).nonzero()[-1])
        assert (row[last + 1 :] == 0).all()
        assert (last == 1) == (length == 2 or not clean_text(text))


def test_tiny_ids():
    tokenizer = TinyTokenizer(WORDS)
    bucket = 5 + zlib.crc32(b"zebra") % TINY_BUCKETS
    start, end = 5 + TINY_BUCKETS, 6 + TINY_BUCKETS
    assert tokenizer(["The RED, zebra circle"], 9).tolist() == [[start, 1, 2, 4, bucket, 3, end, 0, 0]]
    assert (tokenizer.end_token, tokenizer.vocabulary_size) == (end, end + 1)
    row = tokenizer(["it's café-red 中文 🍕"], 12)[0].tolist()
    assert row[-3:] == [end, 0, 0]  # it ' s café - red 中文 🍕
    assert row[6] == 2


def test_unknown_words_mostly_stay_distinct():
    words = ["zebra", "giraffe", "sofa", "umbrella", "laptop", "pizza", "surfboard", "bench"]
    assert len(set(TinyTokenizer(WORDS)([" ".join(words)], 10)[0, 1:-1].tolist())) >= 7


@pytest.mark.parametrize("words", [["Red"], [""], ["two words"], ["it's"], ["red", "blue", "red"]])
def test_bad_word_lists_are_refused(words):
    with pytest.raises(DcrisError, match="word list"):
        TinyTokenizer(words)


def test_the_embedded_words_make_a_tokenizer():
    if not (Path(module.__file__).parents[1] / "assets" / "tiny_words.txt").exists():
        pytest.skip("the embedded towers are not there yet")
    assert TinyTokenizer.embedded().words


def test_cleaning_equals_clips():
    assert clean_text(" The\tRED &amp;amp; “Blue”\u3000 schÃ¶n ") == 'the red & "blue" schön'


@pytest.mark.parametrize(
    "text", ["", " \t\u3000", "&nbsp;", "&amp;#160;", "\u200b\u2060", "&zwnj;", "\x00", "\u00c2\xa0"]
)
def test_blank_phrases(text: str) -> None:
    """What nobody can see is no phrase, for predictions and for data sets alike."""
    assert is_blank(text)
    with pytest.raises(DcrisError, match="is empty; describe the object"):
        require_phrase(text)
    with pytest.raises(DcrisError, match="line 3 has a blank 'sent'"):
        check_text(text, Path("refs.json"), "line 3", "sent")


@pytest.mark.parametrize("text", ["?", "&", "&lt;", "\u72d7", "\u00e9", "\U0001f469\u200d\U0001f467", "a\u200b"])
def test_phrases_that_are_not_blank(text: str) -> None:
    """Signs and any script are phrases, also with invisible characters in between."""
    assert not is_blank(text)


@pytest.mark.parametrize("text", ["", "  \n\t", "&nbsp;", "\u3000", "\x00\x07"])
def test_an_empty_phrase_is_refused(text):
    with pytest.raises(DcrisError, match="is empty"):
        require_phrase(text)


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", "red \udfff cup"])
def test_a_phrase_that_is_not_utf8_is_refused(text):
    """A terminal in another encoding gives such bytes, which cannot be written to result files."""
    with pytest.raises(DcrisError, match="is not UTF-8 text; use a terminal"):
        require_phrase(text)


@pytest.mark.parametrize("text", ["&#" + "9" * 4400, "&amp;#" + "9" * 9000 + ";", "&#" + "0" * 5000 + "1114112"])
def test_a_character_reference_with_many_digits(text):
    """Python's int() raises ValueError for more than 4,300 digits; in HTML, the number is the
    replacement character.
    """
    assert clean_text(f"{text} cup") == "\ufffd cup"
    assert clean_text("&#" + "0" * 5000 + "65;b") == "ab"


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_phrases_are_cleaned_without_ftfy_to_the_same_text(text: str) -> None:
    # ftfy is not imported for most phrases, since that takes a tenth of a second.
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean_text(text) == re.sub(r"\s+", " ", repaired).strip().lower()


def test_a_phrase_is_returned_as_written():
    assert require_phrase(" Left  SLICE ") == " Left  SLICE "


@needs_instant
def test_a_tower_has_a_row_for_each_id_of_its_tokenizer():
    """A configuration with another tokenizer would give an index error, which on a GPU breaks the
    process.
    """
    config = get_recipe("dcris_tiny").model.text
    assert tokenizer_of(config).name == "tiny"
    with pytest.raises(DcrisError, match=r"'clip' has 49,408 ids, but model\.text\.vocabulary is 144"):
        tokenizer_of(config.model_copy(update={"tokenizer": "clip"}))
