"""Exchange left and right in an expression, for horizontal flip augmentation.

Flipping is not part of the paper's training, because an expression would then describe the wrong
object. With the words exchanged it describes the right one, unless "right" has another meaning
("right now") or a side is spelt in a way that is not listed here. Flip augmentation skips such
expressions together with their images: that costs a little variety and never gives a wrong mask.
"""

import re

from dcris.data.cleaning import clean_text

_PAIRS = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("lefthand", "righthand"),
    ("leftside", "rightside"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
)
_OPPOSITE = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# Abbreviations and misspellings of the sides, and words whose meaning changes in a mirrored image.
_AMBIGUOUS = _words("l r lt rt lft lef rgt rigth rite lefty righty clockwise counterclockwise anticlockwise east west")

# Words that contain a side ("topleft", "leftguy") are ambiguous, but not these.
_SIDE = re.compile("left|right")
_NO_SIDE = _words("bright brighter brightest brightly upright alright copyright leftover leftovers cleft")

# In "right now" and "left alone" the word is not a side. The lists apply to both words, so that
# swapping twice gives the original.
_NOT_A_SIDE_AFTER = _words("all has have had been being is are was were gets got get")
_NOT_A_SIDE_BEFORE = _words(
    """
    now away here there next behind beside besides above below under beneath before after at by over out up alone open angle
    angled
    """
)
_IN_FRONT = re.compile(r"\W+in\W+(?:the\W+)?(?:front|middle|center|centre)\b", re.ASCII | re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+", re.ASCII)


def swap_sides(phrase: str) -> str | None:
    """Return the expression for the mirrored image, or None if it is ambiguous.

    An expression without a side is returned unchanged. Swapping twice gives the original. Capitals
    are kept ("Left", "LEFT").
    """
    if len(_SIDE.findall(clean_text(phrase))) != len(_SIDE.findall(phrase.lower())):
        return None  # tokenizers read a side in wide letters or HTML entities
    parts: list[str] = []
    end = 0
    words = list(_WORD.finditer(phrase))
    for place, match in enumerate(words):
        word = match.group()
        if word.lower() in _AMBIGUOUS:
            return None
        opposite = _OPPOSITE.get(word.lower())
        if opposite is None:
            if _SIDE.search(word.lower()) and word.lower() not in _NO_SIDE:
                return None
            continue
        before = words[place - 1].group().lower() if place else ""
        after = words[place + 1].group().lower() if place + 1 < len(words) else ""
        if word.lower() in ("left", "right") and (
            before in _NOT_A_SIDE_AFTER or after in _NOT_A_SIDE_BEFORE or _IN_FRONT.match(phrase, match.end())
        ):
            return None
        if word.isupper():
            opposite = opposite.upper()
        elif word == word.capitalize():
            opposite = opposite.capitalize()
        elif word != word.lower():
            return None  # mixed case such as "leFt" cannot be transferred
        parts += [phrase[end : match.start()], opposite]
        end = match.end()
    return "".join([*parts, phrase[end:]])
