"""Clean the text of phrases as CLIP does, and check that something is left of it.

Without torch, whose import takes longer than most commands on data.
"""

import html
import re
import unicodedata

from dcris.errors import DcrisError
from dcris.utils.arguments import kind_of


def clean_text(text: str, *, strip: bool = False) -> str:
    """Clean a phrase as CLIP does: repair encoding, unescape HTML twice, one space, lower case.

    Cleaning is not idempotent ("&amp;amp;amp;lt;"), so only the tokenizers clean.
    Source: `basic_clean` and `whitespace_clean` in simple_tokenizer.py of OpenAI's CLIP.

    Args:
        text: the phrase.
        strip: also leave out quotes around the phrase and a full stop at its end, which CLIP
            does not. Nothing is left out of a phrase that consists of these only.
    """
    repaired = text
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # late: its import takes longer than a prediction's tokens

        repaired = _unescape(_unescape(ftfy.fix_text(text)))
    cleaned = re.sub(r"\s+", " ", repaired).strip().lower()
    return strip_text(cleaned) if strip else cleaned


# The cleaning has straightened curly quotes. Inside, the same quote may only be an apostrophe, so
# that '"left" or "right"' is not taken for one quotation.
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).|(?<=\w)\1(?=\w))+)\1""")


def strip_text(text: str) -> str:
    """Leave out quotes around a text and a full stop at its end, unless it consists of these."""
    for _ in range(2):  # the full stop may be inside the quotes, and quotes inside other quotes
        shorter = re.sub(r"(?<!\.)\.$", "", text).strip()
        quoted = _QUOTED.fullmatch(shorter)
        text = (quoted[2].strip() if quoted else shorter) or text
    return text


def _unescape(text: str) -> str:
    """Apply `html.unescape`, also to numbers ("&#999...") with too many digits for `int`."""
    # Leading zeros do not count and numbers of more than 7 digits are beyond Unicode, so no result
    # changes.
    return html.unescape(re.sub(r"(?<=&#)0*([0-9]{1,20})[0-9]*", r"\1", text))


def is_blank(text: str) -> bool:
    """Return whether nothing can be seen of a text after cleaning, as of "&nbsp;" and zero-width
    spaces.
    """
    if "&" not in text and re.search("[0-9A-Za-z]", text):  # cleaning removes none of these, and takes long
        return False
    return all(unicodedata.category(char) in _INVISIBLE for char in clean_text(text))


_INVISIBLE = frozenset(("Cc", "Cf", "Zl", "Zp", "Zs"))
"""Unicode's categories of control and format characters, which have no width, and of spaces."""


def require_phrase(text: str) -> str:
    """Return `text` unchanged if it can be used as a phrase.

    Raises DcrisError if it is not a str, is blank after cleaning, or cannot be encoded as UTF-8:
    command line arguments may contain any bytes, result files may not.
    """
    if not isinstance(text, str):
        raise DcrisError(f"a phrase must be a str, and is {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DcrisError(f"the phrase {text!r} is not UTF-8 text; use a terminal or a --pairs file in UTF-8") from error
    if is_blank(text):
        raise DcrisError(f"the phrase {text!r} is empty; describe the object in a few words")
    return text
