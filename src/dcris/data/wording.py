"""What the words of an expression say about its object. Expressions are not parsed."""

import re

_WORDS = {
    "place": """
        left right lft rt leftmost rightmost top bottom topmost bottommost upper lower uppermost highest lowest middle mid
        center centre central front back behind foreground background above below under underneath beneath beside near
        nearest next closest closer close far farther further farthest furthest between inside outside corner side edge end
        against across""",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth last",
    "attribute": """
        red green blue yellow orange purple violet pink brown black white grey gray silver gold golden beige tan cream maroon
        teal turquoise navy blonde blond brunette dark darker darkest bright colored coloured colorful colourful
        big bigger biggest large larger largest small smaller smallest little tiny huge giant tall taller tallest short shorter
        shortest long longer longest thin thick wide narrow fat skinny chubby round square
        wood wooden metal metallic plastic leather brick stone steel denim
        striped stripes stripe plaid checkered checked spotted spots polka floral patterned plain
        shirt tshirt shirts jacket coat sweater hoodie dress skirt jeans pants shorts suit tie hat cap helmet uniform jersey
        vest scarf boots shoes sunglasses
        old older young younger bald bearded beard empty full""",
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_COUNTED = re.compile(r"\b(?:\d*(?:1st|2nd|3rd|\dth)|(?:one|two|three|four|five|six|\d+) (?:in )?from)\b")


def expression_kinds(text: str) -> tuple[str, ...]:
    """Classify what an expression uses to identify its object: "place", "ordinal", "attribute".

    Place words give a position; ordinals count ("third", "2nd", "two from left"); attributes are
    colours, sizes, materials, patterns, clothing and age. Words that often name the object itself
    ("glass", "light") are not in the lists. The text is not parsed: "back of the chair" counts as a
    place.

    Returns:
        The kinds whose words occur, or ("other",).
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("'", ""))
    kinds = {_KIND_OF[word] for word in words if word in _KIND_OF}
    if _COUNTED.search(" ".join(words)):
        kinds.add("ordinal")
    return tuple(kind for kind in _WORDS if kind in kinds) or ("other",)


# fmt: off
_NAMELESS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "it", "its", "he", "she", "his", "her", "him", "you", "they", "them",
    "their", "i", "we", "of", "on", "in", "at", "to", "with", "from", "by", "for", "as", "and", "or", "but", "not", "no",
    "is", "are", "was", "be", "has", "have", "being", "just", "only", "also", "very", "most", "more", "one", "ones", "two",
    "three", "four", "five", "six", "thing", "things", "object", "objects", "item", "items", "shape", "shapes", "guy",
    "picture", "pic", "image", "photo", "photograph", "frame", "view", "row", "side", "part", "area", "all", "both", "other",
    "another", "same", "medium", "plain", "dotted",
))
# fmt: on
"""Words that do not say what kind of object is meant, besides those of `_WORDS`."""


def names_object(text: str, category: str) -> bool:
    """Return whether an expression names the kind of its object.

    "left dog" does, "the left one" and "second from right in red" do not: they can fit an object of
    any category.

    Args:
        text: the expression.
        category: of its object; the category's own name counts, whatever other meaning it has.
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("'", ""))
    own = category.lower().split()
    return any(
        word in own or not (word in _KIND_OF or word in _NAMELESS or any(letter.isdigit() for letter in word))
        for word in words
    )
