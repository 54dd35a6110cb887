"""Combine several data sets into one, without leaks by default.

RefCOCO, RefCOCO+ and RefCOCOg describe the same COCO images and divide them differently, so an
image of one train split may be in another data set's test split. A mixture leaves such training
references out, as PolyFormer does (Liu et al., 2023); "mixed-unfiltered" keeps them, as the
published mixed DETRIS does.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dcris.config import DataConfig
from dcris.data.coco import portable_name
from dcris.data.registry import DATASETS, PARTITIONS
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Reference

Member = tuple[str, str | None]
"""A data set and its `split_by`; None if it has only one partition."""

_MIXTURE = re.compile(r"mixed(-unfiltered)?(?::(.*))?", re.DOTALL)
_MEMBER = re.compile(r"([^(),:]+)(?:\(([^(),:]+)\))?")
_TRAIN = "train"


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture as its name describes it, such as "mixed:refcoco,refcocog(google)"."""

    members: tuple[Member, ...]
    filtered: bool
    """Whether training references are left out if their image is in a val or test split."""


def parse_mixture(name: str) -> Mixture | None:
    """Parse the name of a mixture; return None if it is the name of a single data set.

    `mixed` alone is RefCOCO (unc), RefCOCO+ (unc) and RefCOCOg (umd). Raises DcrisError if the list
    of data sets is malformed.
    """
    match = _MIXTURE.fullmatch(name)
    if match is None:
        return None
    members: tuple[Member, ...] = tuple((dataset, facts.split_by) for dataset, facts in DATASETS.items() if facts.mixed)
    if match[2] is not None:
        usual = {dataset: facts.split_by for dataset, facts in DATASETS.items()}
        found = [_MEMBER.fullmatch(part.strip()) for part in match[2].split(",")]
        members = tuple((part[1].strip(), part[2] or usual.get(part[1].strip())) for part in found if part)
        if len(members) < len(found) or len(set(members)) < len(members) or any(map(parse_mixture, dict(members))):
            raise DcrisError(
                f"{name!r} is not a list of different data sets; write it as in mixed:refcoco,refcocog(google)"
            )
    return Mixture(members, filtered=match[1] is None)


def mix(
    name: str, tables: Sequence[ReferenceTable], others: Sequence[ReferenceTable] = (), *, filtered: bool = True
) -> ReferenceTable:
    """Concatenate data sets, merge splits of the same name, and renumber everything uniquely.

    Args:
        name: name of the mixture.
        tables: its data sets, below one root.
        others: further data sets whose val and test images are held out of training.
        filtered: leave out training references whose image is in another split than train, in any
            of `tables` and `others`.

    Returns:
        The mixture. Its notes state what was left out of each data set.
    """
    sources = [*tables, *others]
    held_out = {_image_key(item, table) for table in sources for item in table.references if item.split != _TRAIN}
    sees = "sees no image" if filtered else "may see images"
    notes = [f"training {sees} of the val and test splits of {', '.join(map(_title, sources))}"]
    for table in sources if filtered else ():
        partition = PARTITIONS.get((table.dataset, table.split_by))
        absent = [split for split in (partition.held_out if partition else ()) if split not in table.splits()]
        if absent:
            notes.append(f"{_title(table)} has no {', '.join(absent)} here, so training may see images of these splits")
    kept: list[tuple[int, str, Reference]] = []
    for number, table in enumerate(tables):
        training, leaks = 0, 0
        for item in table.references:
            image = _image_key(item, table)
            training += item.split == _TRAIN
            leak = item.split == _TRAIN and image in held_out
            leaks += leak
            if not (leak and filtered):
                kept.append((number, image, item))
        leaked = f"{leaks:,} {'left out' if filtered else 'more'}, of images in val or test splits"
        notes.append(f"{_title(table)}: {training - leaks:,} training references, and {leaked}")
    return ReferenceTable(name, ", ".join(map(_title, tables)), tables[0].root, tuple(_renumber(kept)), tuple(notes))


def samples_of_sets(weights: Sequence[float], samples: int) -> list[int]:
    """Return how many of the samples of an epoch are from each data set: in proportion to the
    weights, with the rest of the rounding where it is largest."""
    exact = [samples * weight / sum(weights) for weight in weights]
    counts = [int(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: (counts[number] - exact[number], number))
    for number in by_rest[: samples - sum(counts)]:
        counts[number] += 1
    return counts


def require_weights(config: DataConfig, table: ReferenceTable, samples: int) -> None:
    """Check `data.weights` of a run.

    Args:
        config: of the run.
        table: the data set.
        samples: of an epoch.

    Raises:
        DcrisError: the data set is not a mixture of so many data sets, or one of them has no
            training reference or would have no sample in an epoch.
    """
    weights, mixture = config.weights, parse_mixture(table.dataset)
    if weights is None:
        return
    if mixture is None:
        raise DcrisError(
            f"data.weights is for mixtures of data sets (--dataset mixed), not for {table.dataset}; leave it out"
        )
    names = [name if split_by is None else f"{name}({split_by})" for name, split_by in mixture.members]
    if len(weights) != len(names):
        raise DcrisError(
            f"data.weights has {len(weights)} weights, but {table.dataset} has {len(names)} data sets; give one for each of "
            f"{', '.join(names)}, in this order"
        )
    present = {reference.source for reference in table.split(config.train_split)}
    counts = samples_of_sets(weights, samples)
    for number, name in enumerate(names):
        if number not in present:
            raise DcrisError(f"{name} has no training reference in {table.dataset}; leave it out of the mixture")
        if not counts[number]:
            raise DcrisError(
                f"data.weights gives {name} none of the {samples:,} samples of an epoch; give it a larger weight or leave it "
                "out of the mixture"
            )


def _title(table: ReferenceTable) -> str:
    return f"{table.dataset} {table.split_by}"


def _image_key(reference: Reference, table: ReferenceTable) -> str:
    """Return what identifies an image in all data sets.

    Not its `image_id`: generated sets all begin at 1.
    """
    return portable_name(reference.image_path, table.root, reference.coco_id)


def _renumber(references: Sequence[tuple[int, str, Reference]]) -> Iterator[Reference]:
    """Yield references with identifiers that are unique over all data sets.

    An image keeps its `image_id`, which is COCO's, unless another image has it too.

    Args:
        references: number of the data set, key of the image, and the reference.
    """
    sentences = itertools.count(1)
    annotations: dict[tuple[int, int], int] = {}
    images: dict[str, int] = {}
    taken: set[int] = set()
    free = itertools.count(1 + max((item.image_id for _, _, item in references), default=0))
    for ref_id, (number, image, item) in enumerate(references, 1):
        if image not in images:
            images[image] = next(free) if item.image_id in taken else item.image_id
            taken.add(images[image])
        yield replace(
            item,
            ref_id=ref_id,
            ann_ids=tuple(annotations.setdefault((number, each), len(annotations) + 1) for each in item.ann_ids),
            image_id=images[image],
            source=number,
            expressions=tuple(replace(expression, sent_id=next(sentences)) for expression in item.expressions),
        )
