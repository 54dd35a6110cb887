"""A phrase for a mirrored photograph: left and right change places.

Mirroring is no part of the paper's training, because a phrase would then point at the wrong object. With the words exchanged it
points at the right one, unless "right" means something else ("right now"), or the sides are spelt in a way that is not known
here. Such phrases are left alone, and so are their photographs: that costs a little variety and never a wrong mask.
"""

import re

_PAIRS = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("lefthand", "righthand"),
    ("leftside", "rightside"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
)
_OTHER = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# What the sides are shortened to, and what turns with the picture without being a side.
_UNKNOWN = _words("l r lt rt lft lef rgt rigth rite lefty righty clockwise counterclockwise anticlockwise east west")

# "right now" and "left alone" are no sides. A rule holds for both words, so that a mirrored phrase can be mirrored back.
_BEFORE = _words("all has have had been being is are was were gets got get")
_AFTER = _words(
    """
    now away here there next behind beside besides above below under beneath before after at by over out up alone open angle
    angled
    """
)
_IN_FRONT = re.compile(r"\W+in\W+(?:the\W+)?(?:front|middle|center|centre)\b", re.ASCII | re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+", re.ASCII)


def swap_sides(phrase: str) -> str | None:
    """The phrase for the mirrored photograph; None where it cannot be told what that is.

    A phrase that names no side stays as it is. Of the phrases that can be told, each is its mirror's mirror. Capitals are kept
    ("Left", "LEFT").
    """
    parts: list[str] = []
    end = 0
    words = list(_WORD.finditer(phrase))
    for place, match in enumerate(words):
        word = match.group()
        if word.lower() in _UNKNOWN:
            return None
        other = _OTHER.get(word.lower())
        if other is None:
            continue
        before = words[place - 1].group().lower() if place else ""
        after = words[place + 1].group().lower() if place + 1 < len(words) else ""
        if word.lower() in ("left", "right") and (
            before in _BEFORE or after in _AFTER or _IN_FRONT.match(phrase, match.end())
        ):
            return None
        if word.isupper():
            other = other.upper()
        elif word == word.capitalize():
            other = other.capitalize()
        elif word != word.lower():
            return None  # "leFt": nobody knows how its mirror is spelt
        parts += [phrase[end : match.start()], other]
        end = match.end()
    return "".join([*parts, phrase[end:]])
