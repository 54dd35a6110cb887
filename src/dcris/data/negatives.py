"""Training references whose object is absent (`data.negatives`).

Each is an image of the training split with up to three expressions that are true of nothing in it,
and an empty mask. Images are drawn in proportion to their references, so that a model cannot tell
from the image alone whether an expression fits.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dcris.config import NegativesConfig
from dcris.data.phrases import Nouns, words_for
from dcris.data.readers import refer_layout
from dcris.data.readers.refer_layout import Instances
from dcris.data.scene_phrases import Thing, absent_phrase, read_thing
from dcris.data.table import ReferenceTable, field
from dcris.data.wording import names_object
from dcris.errors import DcrisError
from dcris.types import Expression, Reference
from dcris.utils.streams import counted

_EXPRESSIONS = 3
"""Most expressions of a reference, as many as those of RefCOCO have."""

_TRIES = 20
"""Draws for each expression."""

_Draw = Callable[[Reference, np.random.Generator], Expression | None]
"""Function that draws an expression that is true of nothing in the image of a reference, or
None."""


def add_negatives(
    table: ReferenceTable, settings: NegativesConfig, split: str, nouns: Nouns = MappingProxyType({})
) -> ReferenceTable:
    """Return the table with references to absent objects in one split; a note states how many.

    Args:
        table: all references of the data set.
        settings: share and kinds.
        split: whose images and expressions are used.
        nouns: further words for categories (`data.nouns`).

    Raises:
        DcrisError: the data set has no such split; it cannot give a kind: its references have all
            the same category, or it has no attributes of generated scenes; or no expression was
            found.
    """
    references = table.split(split)
    instances = _instances(table)
    draws = [_DRAWS[kind](table, references, instances, nouns) for kind in settings.kinds]
    wanted = max(1, round(len(references) * settings.share / (1 - settings.share)))
    found = list(itertools.islice(_negatives(references, draws), wanted))
    if not found:
        raise DcrisError(
            f"no expression was found whose object is absent ({', '.join(settings.kinds)}) in the split {split} of "
            f"{table.dataset}; leave data.negatives out or choose other kinds"
        )
    ref_ids = itertools.count(1 + max(reference.ref_id for reference in table.references))
    sent_ids = itertools.count(1 + max(each.sent_id for item in table.references for each in item.expressions))
    added = [
        replace(
            reference,
            ref_id=next(ref_ids),
            expressions=tuple(replace(expression, sent_id=next(sent_ids)) for expression in reference.expressions),
        )
        for reference in found
    ]
    expressions = sum(len(reference.expressions) for reference in added)
    note = f"for absent objects: {counted(len(added), 'reference')} with {counted(expressions, 'expression')}"
    return replace(table, references=(*table.references, *added), notes=(*table.notes, note))


def _negatives(references: Sequence[Reference], draws: Sequence[_Draw]) -> Iterator[Reference]:
    """Yield references to absent objects on the images of the references, in random order, until a
    pass over all of them finds none. Each kind has an equal share of the images.
    """
    for turn in itertools.count():
        order = np.random.default_rng(turn).permutation(len(references))
        empty = True
        for number in order.tolist():
            reference, rng = references[number], np.random.default_rng([turn, number])
            draw = draws[(number + turn) % len(draws)]
            distinct: dict[str, Expression] = {}
            for _ in range(_TRIES * _EXPRESSIONS):
                expression = draw(reference, rng)
                if expression is not None:
                    distinct.setdefault(expression.text, expression)
                if len(distinct) == _EXPRESSIONS:
                    break
            if distinct:
                empty = False
                yield replace(
                    reference, ann_ids=(), category="", segmentations=(), expressions=tuple(distinct.values())
                )
        if empty:
            return


def _instances(table: ReferenceTable) -> Instances | None:
    """Return all annotated instances, without their masks; None for layouts without them."""
    if not refer_layout.find(table.root, table.dataset, table.split_by):
        return None
    return refer_layout.read_instances(table.root, table.dataset, _without_mask)


def _without_mask(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)  # the masks are nearly all of the file
    return record


# ---- the kinds -----------------------------------------------------------------------------------


def _category(
    table: ReferenceTable, references: Sequence[Reference], instances: Instances | None, nouns: Nouns
) -> _Draw:
    """Draw expressions of other images whose category the image lacks.

    The categories of an image are those of all its annotated instances, if the layout has them,
    else those of its references.
    """
    present: dict[Path, set[str]] = {}
    for reference in table.references:
        present.setdefault(reference.image_path, set()).update(_categories(reference))
    if instances is not None:
        paths = {reference.image_id: reference.image_path for reference in references}
        for ann_id, annotation in instances.annotations.items():
            image_id, category_id = (
                field(annotation, key, int, instances.path, f"annotation {ann_id}")
                for key in ("image_id", "category_id")
            )
            if image_id in paths and category_id in instances.categories:
                present[paths[image_id]].add(instances.category_name(category_id))
    pool = [
        (_categories(reference), expression)
        for reference in references
        for expression in reference.expressions
        if reference.targets(expression) and names_object(expression.text, reference.category)
    ]
    if len({category for categories, _ in pool for category in categories}) < 2:
        raise DcrisError(
            f"data.negatives of the kind category needs references of several categories, but those of {table.dataset} "
            "have only one; give them a category, or choose other kinds"
        )

    def draw(reference: Reference, rng: np.random.Generator) -> Expression | None:
        categories, expression = pool[int(rng.integers(len(pool)))]
        here = present[reference.image_path]
        if not here.isdisjoint(categories) or any(
            _mentions(expression.text, (other, *words_for(other, nouns))) for other in here
        ):
            return None
        return replace(expression, kind="absent category")

    return draw


def _categories(reference: Reference) -> list[str]:
    """Return the categories of a reference's objects."""
    return [name.strip() for name in reference.category.split(",") if name.strip()]


def _mentions(text: str, names: Iterable[str]) -> bool:
    """Return whether an expression contains a name of a category, which two categories may
    share."""
    return any(re.search(rf"\b{re.escape(name)}s?\b", text, re.IGNORECASE) for name in names if name)


def _of_scenes(
    kind: str, table: ReferenceTable, references: Sequence[Reference], instances: Instances | None, _: Nouns
) -> _Draw:
    """Draw expressions from what is known about generated scenes."""
    if instances is None:
        raise DcrisError(
            f"data.negatives of the kind {kind} needs generated scenes (`dcris data scenes`), where all is known about the "
            f"objects, and {table.dataset} is another data set; choose the kind category"
        )
    things: dict[int, list[Thing]] = {}
    for ann_id, annotation in instances.annotations.items():
        where = f"annotation {ann_id}"
        image_id, category_id = (
            field(annotation, key, int, instances.path, where) for key in ("image_id", "category_id")
        )
        shape = instances.category_name(category_id) if category_id in instances.categories else ""
        thing = read_thing(shape, annotation.get("attributes"), instances.path, where)
        things.setdefault(image_id, []).append(thing)

    def draw(reference: Reference, rng: np.random.Generator) -> Expression | None:
        phrase = absent_phrase(things[reference.image_id], kind, rng)
        return None if phrase is None else Expression(0, phrase.text, phrase.kind)

    return draw


_DRAWS: Mapping[str, Callable[[ReferenceTable, Sequence[Reference], Instances | None, Nouns], _Draw]] = {
    "category": _category,
    **{kind: partial(_of_scenes, kind) for kind in ("attribute", "place", "relation")},
}
"""By kind, the function that prepares its draws."""
