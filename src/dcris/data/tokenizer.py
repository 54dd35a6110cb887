"""From phrases to token ids: CLIP's byte pairs, and the tiny towers' own words.

Both tokenizers answer [B, L] int64: start token, the phrase, end token, then padding 0. Both import their libraries on
first use, can be pickled into data loader workers, and can be shared by threads.
"""

import html
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dcris.config import TextConfig
from dcris.errors import DcrisError
from dcris.utils.arguments import kind_of
from dcris.utils.hub import fetch

PADDING = 0
"""The padding id of both tokenizers. In CLIP it is also the token of a "!" with more punctuation behind it."""

CLIP_REPOSITORY = "openai/clip-vit-base-patch16"
"""On the Hub; all of CLIP's text towers have one vocabulary."""

CLIP_VOCABULARY_SIZE = 49408
CLIP_START = 49406
CLIP_END = 49407
TINY_BUCKETS = 64


class Tokenizer(Protocol):
    """Phrases to ids. The members are read-only, so that classes may compute them."""

    @property
    def name(self) -> str:
        """ "clip" or "tiny": what a checkpoint writes down."""

    @property
    def vocabulary_size(self) -> int:
        """Rows of the token table: every id is below it."""

    @property
    def end_token(self) -> int:
        """The id whose feature is the sentence's; its first place in a row is the end of the phrase."""

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Write each text as a row of [B, length] int64; a longer one is cut and ends with the end token.

        Raises DcrisError where `length` cannot hold the start and the end token. Source: CLIP's tokenize(truncate=True).
        """


def clean_text(text: str) -> str:
    """Clean a phrase in CLIP's order: mend the encoding, unescape HTML twice, one space between words, lower case.

    Cleaning twice is not always cleaning once ("&amp;amp;amp;lt;"), so clean only where the text is turned into tokens.
    Source: `basic_clean` and `whitespace_clean` of OpenAI's CLIP, `simple_tokenizer.py`.
    """
    import ftfy

    mended = _unescape(_unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", mended).strip().lower()


def _unescape(text: str) -> str:
    """`html.unescape`, also of numbers ("&#999...") that are too long for Python's `int`, which raises ValueError for them."""
    # Zeros in front do not count, and every number of more than 7 digits is beyond Unicode, so no result changes.
    return html.unescape(re.sub(r"(?<=&#)0*([0-9]{1,20})[0-9]*", r"\1", text))


def require_phrase(text: str) -> str:
    """Return `text` as it was given.

    Raises DcrisError where it is no text, where cleaning leaves nothing of it, as no object would be meant, and where it is not
    UTF-8: the command line may hold any bytes, and a result file may not.
    """
    if not isinstance(text, str):
        raise DcrisError(f"a phrase is text (str), and this one is {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DcrisError(
            f"the phrase {text!r} is not UTF-8 text; use a UTF-8 terminal, or a UTF-8 list for --pairs"
        ) from error
    if not clean_text(text):
        raise DcrisError(f"the phrase {text!r} is empty; write in a few words which object is meant")
    return text


def _rows(phrases: Sequence[Sequence[int]], start: int, end: int, length: int) -> Tensor:
    """Frame, cut and pad: [B, length] int64."""
    if length < 2:
        raise DcrisError(f"the text length is {length}; it has to be 2 or more, to hold the start and the end token")
    rows = torch.full((len(phrases), length), PADDING, dtype=torch.int64)
    for row, ids in zip(rows, phrases, strict=True):
        framed = [start, *ids[: length - 2], end]
        row[: len(framed)] = torch.tensor(framed)
    return rows


def _refuse_bare_text(texts: Sequence[str]) -> None:
    if isinstance(texts, str):  # a str is a sequence of str too: it would silently become one row a letter
        raise TypeError("a tokenizer takes a list of phrases, not one phrase")


# CLIP reads the names of its two special tokens in a phrase as those tokens, but only where its pattern starts a new
# token there: after punctuation ("!<|endoftext|>") the name is plain text. `[^\w\s]|_` is punctuation; runs of names count.
_SPECIAL = re.compile(r"((?<![^\w\s])(?<!_)(?:<\|(?:start|end)oftext\|>)+)")


class ClipTokenizer:
    """CLIP's byte-pair tokens: 49,408 of them, start 49406, end 49407, padding 0.

    `file` is the `tokenizer.json` of a CLIP repository on the Hub, read by `tokenizers`. Without it the vocabulary
    inside `instant-clip-tokenizer` is used, which needs no network but is published for Python 3.11 and 3.12 only.
    The vocabulary is read at the first call; that call raises DcrisError where it is missing or not CLIP's.
    """

    name = "clip"
    vocabulary_size = CLIP_VOCABULARY_SIZE
    end_token = CLIP_END

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Tokens [B, length] int64 of the cleaned texts.

        The ids are those of OpenAI's tokenizer, but for three oddities: "'ſ" (the long s of old print, which OpenAI's
        case-blind pattern takes for "'s"), the Greek iota subscript, and characters newer than the Unicode tables of
        the library that splits the words.
        """
        _refuse_bare_text(texts)
        return _rows([self._encode(clean_text(text)) for text in texts], CLIP_START, CLIP_END, length)

    def _encode(self, text: str) -> list[int]:
        backend = _clip_backend(self.file)
        ids: list[int] = []
        for number, piece in enumerate(_SPECIAL.split(text)):
            if number % 2:  # split() puts what the pattern found at the odd places
                names = re.findall("start|end", piece)
                ids += [CLIP_START if name == "start" else CLIP_END for name in names]
            elif piece:
                ids += backend(piece)
        return ids


class _HubVocabulary:
    """A `tokenizer.json`, with everything around its byte pairs switched off: cleaning and framing are done here."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as HubTokenizer

        if not file.is_file():
            raise DcrisError(f"CLIP's vocabulary is missing: there is no file {file}")
        try:
            self.tokenizer = HubTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise DcrisError(f"cannot read CLIP's vocabulary, {file} ({error}); fetch the file again") from error
        found = [self.tokenizer.token_to_id(f"<|{name}oftext|>") for name in ("start", "end")]
        if found != [CLIP_START, CLIP_END]:
            raise DcrisError(
                f"{file} is not CLIP's vocabulary: its start and end tokens are {found[0]} and {found[1]}, not "
                f"{CLIP_START} and {CLIP_END}; take tokenizer.json from the repository of the CLIP text tower"
            )
        self.tokenizer.no_truncation()  # the file may carry its own length and padding
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # special names are told apart by ClipTokenizer, before

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class _InstantVocabulary:
    """The vocabulary carried by `instant-clip-tokenizer`, which needs no file and no network."""

    def __init__(self) -> None:
        try:
            import instant_clip_tokenizer
        except ImportError as error:
            raise DcrisError(
                "CLIP's vocabulary is not here: give the tokenizer.json of a CLIP repository on the Hub, or use Python "
                "3.11 or 3.12 and run `pip install instant-clip-tokenizer`"
            ) from error
        self.tokenizer: Any = instant_clip_tokenizer.Tokenizer()

    def __call__(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]


@lru_cache(maxsize=4)  # by file, for the whole process: a ClipTokenizer itself stays small enough to be pickled
def _clip_backend(file: Path | None) -> _HubVocabulary | _InstantVocabulary:
    return _InstantVocabulary() if file is None else _HubVocabulary(file)


_WORD = re.compile(r"\w+|[^\w\s]")


class TinyTokenizer:
    """Whole words of the generated scenes' language, for the tiny towers that come with dcris.

    Ids: 0 padding, 1..n the words in the order given, then 64 buckets, then start, then end, the greatest id. Any other
    word falls into the bucket its CRC-32 names, so that every phrase can be written down: unlike with one unknown
    token, unknown words mostly stay distinct, and adapters trained on new phrases can learn them.
    Raises DcrisError where a word of the list is given twice or is not one lower-case word.
    """

    name = "tiny"

    def __init__(self, words: Sequence[str]) -> None:
        for word in words:
            if _WORD.findall(word) != [word] or word != word.lower():
                raise DcrisError(f"the tiny tokenizer's list of words holds {word!r}, which is not one lower-case word")
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, start=1)}
        if len(self._ids) != len(self.words):
            twice = next(word for number, word in enumerate(self.words, start=1) if self._ids[word] != number)
            raise DcrisError(f"the tiny tokenizer's list of words holds {twice!r} twice")
        self._first_bucket = len(self.words) + 1
        self._start = self._first_bucket + TINY_BUCKETS
        self.end_token = self._start + 1
        self.vocabulary_size = self.end_token + 1

    @classmethod
    def embedded(cls) -> "TinyTokenizer":
        """The tokenizer of the towers inside the package: its words are `assets/tiny_words.txt`, one a line."""
        text = resources.files("dcris").joinpath("assets", "tiny_words.txt").read_text(encoding="utf-8")
        return cls(text.split())

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Tokens [B, length] int64 of the cleaned texts, punctuation split off the words."""
        _refuse_bare_text(texts)
        return _rows([self._encode(clean_text(text)) for text in texts], self._start, self.end_token, length)

    def _encode(self, text: str) -> list[int]:
        return [self._ids.get(word) or self._bucket(word) for word in _WORD.findall(text)]

    def _bucket(self, word: str) -> int:
        # not hash(): Python salts it anew in every process
        return self._first_bucket + zlib.crc32(word.encode()) % TINY_BUCKETS


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a text tower's configuration, "clip" or "tiny"; made once, as it never changes and may be shared.

    CLIP's vocabulary is that of instant-clip-tokenizer where it is installed, which is where Python is 3.11 or 3.12, and else
    the Hub's, fetched once. Raises DcrisError where neither can be had.
    """
    if name == "tiny":
        return TinyTokenizer.embedded()
    if find_spec("instant_clip_tokenizer") is not None:
        return ClipTokenizer()
    return ClipTokenizer(fetch(CLIP_REPOSITORY, "main", ["tokenizer.json"]).path)


def tokenizer_of(tower: TextConfig) -> Tokenizer:
    """The tokenizer of a text tower.

    Raises DcrisError where it cannot be had (see get_tokenizer), and where the tower lacks some of its ids: looking those up
    ends a program, and on a GPU everything after it.
    """
    tokenizer = get_tokenizer(tower.tokenizer)
    if tokenizer.vocabulary_size > tower.vocabulary:
        raise DcrisError(
            f"model.text.tokenizer {tower.tokenizer!r} has {tokenizer.vocabulary_size:,} ids, and model.text.vocabulary is "
            f"{tower.vocabulary:,}; they are of different towers"
        )
    return tokenizer
