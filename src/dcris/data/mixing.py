"""Several data sets as one, leak-free by default.

RefCOCO, RefCOCO+ and RefCOCOg describe the same COCO photographs and divide them differently, so a photograph that one of them
trains on may be another's test. A mixture leaves such training references out, as PolyFormer does (Liu et al. 2023);
"mixed-unfiltered" keeps them, as the published mixed DETRIS does.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcris.data.image_folders import name_within
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Reference

Load = Callable[[Path, str, str | None], ReferenceTable]
Has = Callable[[Path, str, str], bool]
Member = tuple[str, str | None]
"""A data set and its `split_by`; None where it has only one."""

_FAMILY: Mapping[Member, tuple[str, ...]] = {
    ("refcoco", "unc"): ("val", "testA", "testB"),
    ("refcoco+", "unc"): ("val", "testA", "testB"),
    ("refcocog", "umd"): ("val", "test"),
    ("refcocog", "google"): ("val",),
}
"""The sets that share COCO's photographs, and the splits whose photographs nobody is to train on."""
_USUAL = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
_MIXTURE = re.compile(r"mixed(-unfiltered)?(?::(.*))?", re.DOTALL)
_MEMBER = re.compile(r"([^(),:]+)(?:\(([^(),:]+)\))?")
_TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a data set's name such as "mixed:refcoco,refcocog(google)" stands for."""

    members: tuple[Member, ...]
    filtered: bool


def parse_mixture(name: str) -> Mixture | None:
    """What the name stands for; None where it is that of a single data set.

    `mixed` alone is RefCOCO (unc), RefCOCO+ (unc) and RefCOCOg (umd). Raises DcrisError where the list of sets makes no sense.
    """
    match = _MIXTURE.fullmatch(name)
    if match is None:
        return None
    members: tuple[Member, ...] = tuple(_USUAL.items())
    if match[2] is not None:
        found = [_MEMBER.fullmatch(part.strip()) for part in match[2].split(",")]
        members = tuple((part[1].strip(), part[2] or _USUAL.get(part[1].strip())) for part in found if part)
        if len(members) < len(found) or len(set(members)) < len(members) or any(map(parse_mixture, dict(members))):
            raise DcrisError(
                f"the data set {name!r} is no list of different sets; write it as mixed:refcoco,refcocog(google)"
            )
    return Mixture(members, filtered=match[1] is None)


def load_mixture(root: Path, name: str, mixture: Mixture, load: Load, has: Has) -> ReferenceTable:
    """Read the sets below `root` and mix them.

    Of RefCOCO, RefCOCO+ and both partitions of RefCOCOg, the val and test splits count as such wherever `has` finds them, mixed
    or not. Raises DcrisError as `load` does.
    """
    tables = [load(root, *member) for member in mixture.members]
    others = [
        load(root, dataset, split_by)
        for dataset, split_by in (_FAMILY if mixture.filtered else ())
        if split_by and (dataset, split_by) not in mixture.members and has(root, dataset, split_by)
    ]
    return mix(name, tables, others, filtered=mixture.filtered)


def mix(
    name: str, tables: Sequence[ReferenceTable], others: Sequence[ReferenceTable] = (), *, filtered: bool = True
) -> ReferenceTable:
    """Put data sets one behind the other, splits of one name together, and number everything anew so that it stays unique.

    Args:
        name: of the whole.
        tables: data sets below one root.
        others: data sets that are not part of the mixture, but whose val and test splits training is not to see either.
        filtered: leave out training references whose photograph is in a split other than train of any of them.

    Its notes say what was left out of each set.
    """
    sources = [*tables, *others]
    evaluated = {_photograph(item, table) for table in sources for item in table.references if item.split != _TRAIN}
    sees = "sees no photograph" if filtered else "may see photographs"
    notes = [f"training {sees} of the val and test splits of {', '.join(map(_title, sources))}"]
    for table in sources if filtered else ():
        absent = [split for split in _FAMILY.get((table.dataset, table.split_by), ()) if split not in table.splits()]
        if absent:
            notes.append(f"{_title(table)} has no {', '.join(absent)} here, so training may see their photographs")
    kept: list[tuple[int, str, Reference]] = []
    for number, table in enumerate(tables):
        training, leaks = 0, 0
        for item in table.references:
            photograph = _photograph(item, table)
            training += item.split == _TRAIN
            leak = item.split == _TRAIN and photograph in evaluated
            leaks += leak
            if not (leak and filtered):
                kept.append((number, photograph, item))
        leaked = f"{leaks:,} {'left out' if filtered else 'more'}, of photographs in val or test splits"
        notes.append(f"{_title(table)}: {training - leaks:,} training references, and {leaked}")
    return ReferenceTable(name, ", ".join(map(_title, tables)), tables[0].root, tuple(_renumber(kept)), tuple(notes))


def _title(table: ReferenceTable) -> str:
    return f"{table.dataset} {table.split_by}"


def _photograph(reference: Reference, table: ReferenceTable) -> str:
    """What tells a photograph from others. Not its `image_id`: two generated sets both begin at 1."""
    return name_within(reference.image_path, table.root)


def _renumber(references: Sequence[tuple[int, str, Reference]]) -> Iterator[Reference]:
    """References, each behind the number of its set and its photograph, with identifiers that are unique over all sets.

    A photograph keeps its `image_id`, which is COCO's, unless another photograph has it.
    """
    sentences = itertools.count(1)
    annotations: dict[tuple[int, int], int] = {}
    images: dict[str, int] = {}
    taken: set[int] = set()
    free = itertools.count(1 + max((item.image_id for _, _, item in references), default=0))
    for ref_id, (number, photograph, item) in enumerate(references, 1):
        if photograph not in images:
            images[photograph] = next(free) if item.image_id in taken else item.image_id
            taken.add(images[photograph])
        yield replace(
            item,
            ref_id=ref_id,
            ann_id=annotations.setdefault((number, item.ann_id), len(annotations) + 1),
            image_id=images[photograph],
            expressions=tuple(replace(expression, sent_id=next(sentences)) for expression in item.expressions),
        )
