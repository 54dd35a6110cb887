"""Convert phrases to token ids: CLIP's byte pairs, BERT's word pieces, and the words of the tiny
towers.

All tokenizers return [B, L] int64: start token, tokens of the phrase, end token, then padding 0.
They import their libraries on first use, can be pickled for data loader workers, and are
thread-safe.
"""

import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dcris.config import DataConfig, TextConfig
from dcris.data.cleaning import clean_text, strip_text
from dcris.errors import DcrisError
from dcris.utils.hub import fetch
from dcris.utils.wheels import minilm_file

PADDING = 0
"""Padding id of all tokenizers. In CLIP it is also the token of a "!" that is followed by
punctuation."""

CLIP_REPOSITORY = "openai/clip-vit-base-patch16"
"""Repository on the Hub; all text towers of CLIP have the same vocabulary."""

MINILM_TOKENIZER = minilm_file(
    "model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
"""BERT's uncased vocabulary, in the package that has MiniLM's weights."""

BERT_VOCABULARY_SIZE = 30522
BERT_START = 101
BERT_END = 102
BERT_MASK = 103
CLIP_VOCABULARY_SIZE = 49408
CLIP_START = 49406
CLIP_END = 49407
TINY_BUCKETS = 64


class Tokenizer(Protocol):
    """Interface of tokenizers. The members are read-only, so that classes may compute them."""

    @property
    def name(self) -> str:
        """ "clip", "bert" or "tiny", as recorded in checkpoints."""

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, which begin at 0."""

    @property
    def end_token(self) -> int:
        """Id of the token whose feature stands for the sentence.

        Its first occurrence in a row ends the phrase.
        """

    @property
    def mask_token(self) -> int:
        """Id that stands for a masked word: BERT's [MASK], or else the start token, which has no
        meaning inside a phrase.
        """

    def __call__(self, texts: Sequence[str], length: int, *, strip: bool = False) -> Tensor:
        """Return the tokens of each text, [B, length] int64.

        Longer texts are cut before the end token. `strip` is that of `clean_text`.

        Raises DcrisError if `length` is below 2. Source: CLIP's tokenize(truncate=True).
        """


def _rows(
    texts: Sequence[str], encode: Callable[[str], list[int]], start: int, end: int, length: int, strip: bool
) -> Tensor:
    """Clean and encode texts, add start and end tokens, cut and pad: [B, length] int64."""
    if isinstance(texts, str):  # a str is also a sequence of str: each letter would become a row
        raise TypeError("a tokenizer takes a list of phrases, not a single phrase")
    if length < 2:
        raise DcrisError(f"the text length is {length}, but must be at least 2, for the start and the end token")
    rows = torch.full((len(texts), length), PADDING, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        framed = [start, *encode(clean_text(text, strip=strip))[: length - 2], end]
        row[: len(framed)] = torch.tensor(framed)
    return rows


# In a phrase, CLIP converts the names of its two special tokens to these tokens, but only where its
# pattern starts a new token: directly after punctuation ("!<|endoftext|>") the name is plain text.
# `[^\w\s]|_` is punctuation. Names may repeat.
_SPECIAL = re.compile(r"((?<![^\w\s])(?<!_)(?:<\|(?:start|end)oftext\|>)+)")


class ClipTokenizer:
    """CLIP's byte-pair tokens: 49,408 ids, start 49406, end 49407, padding 0.

    The vocabulary is read at the first call, which raises DcrisError if it is missing or not
    CLIP's.

    Args:
        file: `tokenizer.json` of a CLIP repository on the Hub, read with `tokenizers`. Default: the
            vocabulary in `instant-clip-tokenizer`, which needs no network but is published only for
            Python 3.11 and 3.12.
    """

    name = "clip"
    vocabulary_size = CLIP_VOCABULARY_SIZE
    end_token = CLIP_END
    mask_token = CLIP_START

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def __call__(self, texts: Sequence[str], length: int, *, strip: bool = False) -> Tensor:
        """Return the tokens [B, length] int64 of the cleaned texts.

        The ids equal those of OpenAI's tokenizer with three exceptions: "'ſ" (long s, which
        OpenAI's case-insensitive pattern takes for "'s"), the Greek iota subscript, and characters
        that are newer than the Unicode tables of the library that splits the words.
        """
        return _rows(texts, self._encode, CLIP_START, CLIP_END, length, strip)

    def _encode(self, text: str) -> list[int]:
        backend = _clip_backend(self.file)
        ids: list[int] = []
        for number, piece in enumerate(_SPECIAL.split(text)):
            if number % 2:  # split() returns the matches at odd indices
                names = re.findall("start|end", piece)
                ids += [CLIP_START if name == "start" else CLIP_END for name in names]
            elif piece:
                ids += backend(piece)
        return ids


class _HubVocabulary:
    """A `tokenizer.json`, with everything around its words' pieces switched off: framing is done
    here, and ClipTokenizer handles the names of special tokens.
    """

    def __init__(self, file: Path, title: str, names: tuple[str, str], expected: tuple[int, int]) -> None:
        """Read the file of the tower `title`, whose start and end tokens have these names, ids."""
        from tokenizers import Tokenizer as HubTokenizer

        if not file.is_file():
            raise DcrisError(f"{title}'s vocabulary is missing: there is no file {file}")
        try:
            self.tokenizer = HubTokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception for every kind of broken file
            raise DcrisError(f"cannot read {title}'s vocabulary, {file} ({error}); download the file again") from error
        found = tuple(self.tokenizer.token_to_id(name) for name in names)
        if found != expected:
            raise DcrisError(
                f"{file} is not {title}'s vocabulary: its start and end tokens are {found[0]} and {found[1]}, not "
                f"{expected[0]} and {expected[1]}; use tokenizer.json from the repository of the {title} text encoder"
            )
        self.tokenizer.no_truncation()  # the file may define its own length and padding
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # in a phrase, such a name is plain text

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class _InstantVocabulary:
    """The vocabulary in `instant-clip-tokenizer`, which needs no file and no network."""

    def __init__(self) -> None:
        try:
            import instant_clip_tokenizer
        except ImportError as error:
            raise DcrisError(
                "CLIP's vocabulary is not installed: give the tokenizer.json of a CLIP repository on the Hub, or use Python "
                "3.11 or 3.12 and run `pip install instant-clip-tokenizer`"
            ) from error
        self.tokenizer: Any = instant_clip_tokenizer.Tokenizer()

    def __call__(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text)]


@lru_cache(maxsize=4)  # outside of ClipTokenizer, which thus stays small enough to be pickled
def _clip_backend(file: Path | None) -> _HubVocabulary | _InstantVocabulary:
    if file is None:
        return _InstantVocabulary()
    return _HubVocabulary(file, "CLIP", ("<|startoftext|>", "<|endoftext|>"), (CLIP_START, CLIP_END))


class BertTokenizer:
    """BERT's word pieces: 30,522 ids, start 101, end 102, padding 0.

    The vocabulary is read at the first call, which raises DcrisError if it is missing.

    Args:
        file: `tokenizer.json` of an uncased BERT; by default, that of all-minilm-l6-v2.
    """

    name = "bert"
    vocabulary_size = BERT_VOCABULARY_SIZE
    end_token = BERT_END
    mask_token = BERT_MASK

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def __call__(self, texts: Sequence[str], length: int, *, strip: bool = False) -> Tensor:
        """Return the tokens [B, length] int64 of the cleaned texts."""
        return _rows(texts, _bert_backend(self.file), BERT_START, BERT_END, length, strip)

    def save(self, file: Path) -> None:
        """Write the vocabulary as a `tokenizer.json`."""
        _bert_backend(self.file).tokenizer.save(str(file))


@lru_cache(maxsize=4)
def _bert_backend(file: Path | None) -> _HubVocabulary:
    return _HubVocabulary(file or MINILM_TOKENIZER.find(), "BERT", ("[CLS]", "[SEP]"), (BERT_START, BERT_END))


_WORD = re.compile(r"\w+|[^\w\s]")


class TinyTokenizer:
    """Whole words of the generated scenes' language, for the tiny towers in the package.

    Ids: 0 padding, 1 to n the words in the given order, then 64 buckets, the start token, and the
    end token. Other words are assigned to a bucket by their CRC-32, so every phrase can be
    represented, and unknown words mostly have different ids, so that adapters can learn them.

    Args:
        words: distinct lower-case words; DcrisError is raised for anything else.
    """

    name = "tiny"

    def __init__(self, words: Sequence[str]) -> None:
        for word in words:
            if _WORD.findall(word) != [word] or word != word.lower():
                raise DcrisError(
                    f"the word list of the tiny tokenizer contains {word!r}, which is not a lower-case word"
                )
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, start=1)}
        if len(self._ids) != len(self.words):
            twice = next(word for number, word in enumerate(self.words, start=1) if self._ids[word] != number)
            raise DcrisError(f"the word list of the tiny tokenizer contains {twice!r} twice")
        self._first_bucket = len(self.words) + 1
        self.mask_token = self._first_bucket + TINY_BUCKETS  # the start token
        self.end_token = self.mask_token + 1
        self.vocabulary_size = self.end_token + 1

    @classmethod
    def embedded(cls) -> "TinyTokenizer":
        """Return the tokenizer of the tiny towers, with the words in `assets/tiny_words.txt`."""
        text = resources.files("dcris").joinpath("assets", "tiny_words.txt").read_text(encoding="utf-8")
        return cls(text.split())

    def __call__(self, texts: Sequence[str], length: int, *, strip: bool = False) -> Tensor:
        """Return the tokens [B, length] int64 of the cleaned texts. Punctuation marks are words."""
        return _rows(texts, self._encode, self.mask_token, self.end_token, length, strip)

    def _encode(self, text: str) -> list[int]:
        return [self._ids.get(word) or self._bucket(word) for word in _WORD.findall(text)]

    def _bucket(self, word: str) -> int:
        # not hash(), which differs between processes
        return self._first_bucket + zlib.crc32(word.encode()) % TINY_BUCKETS


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with the name "clip", "bert" or "tiny", one instance per process.

    CLIP's vocabulary is that of instant-clip-tokenizer if it is installed, as on Python 3.11 and
    3.12, else that of the Hub, downloaded once. Raises DcrisError if neither is available.
    """
    if name == "tiny":
        return TinyTokenizer.embedded()
    if name == "bert":
        return BertTokenizer()
    if find_spec("instant_clip_tokenizer") is not None:
        return ClipTokenizer()
    return ClipTokenizer(fetch(CLIP_REPOSITORY, "main", ["tokenizer.json"]).path)


def tokenizer_of(tower: TextConfig) -> Tokenizer:
    """Return the tokenizer of a text tower.

    Raises DcrisError if it is not available (see get_tokenizer), or has more ids than the tower: an
    index outside the token table ends the program, and leaves a GPU unusable for the process.
    """
    tokenizer = get_tokenizer(tower.tokenizer)
    if tokenizer.vocabulary_size > tower.vocabulary:
        raise DcrisError(
            f"model.text.tokenizer {tower.tokenizer!r} has {tokenizer.vocabulary_size:,} ids, but model.text.vocabulary is "
            f"{tower.vocabulary:,}; they belong to different encoders"
        )
    return tokenizer


def strips(config: DataConfig, *, predicting: bool) -> bool:
    """Return whether a model leaves quotes and a full stop out of phrases (`clean_text`).

    Args:
        config: the model's data configuration.
        predicting: for predictions; otherwise for training and evaluation.
    """
    return config.strip_phrases == "always" or (predicting and config.strip_phrases == "predict")


def tokenize(texts: Sequence[str], config: DataConfig, tokenizer: Tokenizer, *, predicting: bool = False) -> Tensor:
    """Return the tokens of phrases as a model reads them, [B, config.word_length] int64.

    Args and errors: as in `Tokenizer` and `strips`.
    """
    return tokenizer(texts, config.word_length, strip=strips(config, predicting=predicting))


def cut_texts(texts: Sequence[str], config: DataConfig, tokenizer: Tokenizer, *, predicting: bool = False) -> list[str]:
    """Return the texts that a model does not read to their end: they have more tokens than
    `config.word_length`, start and end token included.

    All tokenizers split at white space first, so a text's tokens are those of its words, and
    tokenising each distinct word once is much cheaper. Only in plain ASCII text does cleaning not
    cross words: "&" begins HTML entities, "<|" CLIP's special tokens.
    """
    length, strip = config.word_length, strips(config, predicting=predicting)
    plain = {text: strip_text(text.strip()) if strip else text for text in texts if _PLAIN.fullmatch(text)}
    words = [*{word for text in plain.values() for word in text.split()}]
    # The end token is last, since "<|" is excluded. A word that is cut here makes its text too long
    # anyway.
    rows = tokenizer(words, length + 1) if words else torch.empty(0, length + 1)
    sizes = dict(zip(words, ((rows == tokenizer.end_token).int().argmax(dim=1) - 1).tolist(), strict=True))
    longer = [text for text, read in plain.items() if sum(sizes[word] for word in read.split()) + 2 > length]
    others = [text for text in texts if text not in plain]
    if others:
        tokens = tokenizer(others, length + 1, strip=strip)
        longer += [text for text, row in zip(others, tokens, strict=True) if row[length] != PADDING]
    return longer


_PLAIN = re.compile(r"(?:(?!&|<\|)[ -~])*")


def unread_end(text: str, config: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the words at the end of a phrase of `cut_texts` that predictions ignore.

    The words are cleaned. The first of them may be read in part.
    """
    words = clean_text(text, strip=strips(config, predicting=True)).split(" ")
    # A word has a token at least, so the phrase is cut within so many words.
    read = bisect_left(
        range(1, min(len(words), config.word_length)),
        True,
        key=lambda count: bool(tokenizer([" ".join(words[:count])], config.word_length + 1)[0, -1] != PADDING),
    )
    return " ".join(words[read:])
