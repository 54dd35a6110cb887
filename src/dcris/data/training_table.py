"""What `data.licences`, `data.generate_phrases` and `data.negatives` make of the references that a
run trains on.

The first two need `instances.json` of the REFER layout, which has the licence of each photograph
and all annotated instances, most of which no reference describes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from dcris.config import DataConfig
from dcris.data.colours import colour_shares, shows_colours
from dcris.data.images import fit_image, read_image
from dcris.data.masks import decode_mask, mask_area, mask_box
from dcris.data.negatives import add_negatives
from dcris.data.phrases import Instance, describable, draw, statements
from dcris.data.readers import refer_layout
from dcris.data.readers.refer_layout import Instances
from dcris.data.table import ReferenceTable, bad, check_text, field
from dcris.errors import DcrisError
from dcris.types import Expression, Reference
from dcris.utils.arguments import did_you_mean
from dcris.utils.streams import counted

_MOST_INSTANCES = 500
"""Most instances of a photograph. COCO has at most 100, and the time grows with the square."""

_LONGEST_NAME = 100
"""Most characters of a category's name."""


def training_table(table: ReferenceTable, config: DataConfig) -> ReferenceTable:
    """Return the table that a run trains on: `table` itself unless one of the settings is used.

    Only the training split changes. Its references on photographs of other licences are left out,
    and a generated reference, with several phrases, is added for each instance that can be
    described. Photographs that another split refers to get none. Then references to absent objects
    are added. The notes state all that.

    Args:
        table: all references of the data set, from `load_references`.
        config: licences, generate_phrases, nouns, negatives, train_split and on_bad_image are used.

    Raises:
        DcrisError: the layout has no `instances.json`; the file is malformed or has only instances
            that have references; no photograph is left; or a photograph cannot be read (unless
            `on_bad_image` is "skip"); or as `add_negatives` does.
    """
    if config.licences is not None or config.generate_phrases:
        table = _from_instances(table, config)
    return (
        table if config.negatives is None else add_negatives(table, config.negatives, config.train_split, config.nouns)
    )


def _from_instances(table: ReferenceTable, config: DataConfig) -> ReferenceTable:
    """Apply the two settings that need `instances.json`."""
    before = table.split(config.train_split)
    setting = "data.licences" if config.licences is not None else "data.generate_phrases"
    if not refer_layout.find(table.root, table.dataset, table.split_by):
        raise DcrisError(
            f"{setting} needs a data set in the REFER layout, whose instances.json states licences and instances; "
            f"{table.dataset} in {table.root} is in another layout or a mixture, so leave the setting out"
        )
    instances = refer_layout.read_instances(table.root, table.dataset)
    references, notes = list(table.references), list(table.notes)
    if config.licences is not None:
        references = [
            item
            for item in references
            if item.split != config.train_split or _licence(instances, item.image_id) in config.licences
        ]
        kept = sum(item.split == config.train_split for item in references)
        notes.append(
            f"of {len(before):,} training references, {kept:,} are on photographs of the "
            f"licences {', '.join(map(str, config.licences))}"
        )
    if config.generate_phrases:
        added = list(_generate(table, instances, config))
        references += added
        expressions = sum(len(reference.expressions) for reference in added)
        images = len({reference.image_id for reference in added})
        notes.append(
            f"generated: {counted(len(added), 'reference')} with {counted(expressions, 'phrase')} on "
            f"{counted(images, 'photograph')}"
        )
    if not any(item.split == config.train_split for item in references):
        raise DcrisError(
            f"no training reference of {table.dataset} is left: its photographs have none of the licences "
            f"{', '.join(map(str, config.licences or ()))}; change data.licences"
        )
    return replace(table, references=tuple(references), notes=tuple(notes))


def _licence(instances: Instances, image_id: int) -> int:
    return field(instances.images[image_id], "license", int, instances.path, f"image {image_id}")


def _generate(table: ReferenceTable, instances: Instances, config: DataConfig) -> Iterator[Reference]:
    """Yield the generated references, in the order of the file's images and annotations."""
    if instances.annotations.keys() <= {ann_id for reference in table.references for ann_id in reference.ann_ids}:
        raise DcrisError(
            f"{instances.path} has only instances that have references, and phrases cannot be generated without all "
            "instances of a photograph; use the file of the REFER release, or leave data.generate_phrases out"
        )
    names = {*map(instances.category_name, instances.categories)}
    if unknown := sorted(config.nouns.keys() - names):
        raise DcrisError(
            f"data.nouns has words for {unknown[0]!r}{did_you_mean(unknown[0], names)}, which is no category of "
            f"{instances.path}; correct the name or leave it out"
        )
    held_out = [reference for reference in table.references if reference.split != config.train_split]
    ids, paths = ({item.image_id for item in held_out}, {item.image_path for item in held_out})
    by_image: dict[int, list[dict[str, Any]]] = {}
    for ann_id, annotation in instances.annotations.items():
        image_id = field(annotation, "image_id", int, instances.path, f"annotation {ann_id}")
        by_image.setdefault(image_id, []).append(annotation)
    ref_ids = itertools.count(1 + max(reference.ref_id for reference in table.references))
    sent_ids = itertools.count(1 + max(said.sent_id for item in table.references for said in item.expressions))
    for image_id in instances.images:
        # By path as well: one photograph may be there under two identifiers.
        if image_id in ids or instances.image_path(image_id) in paths or image_id not in by_image:
            continue
        if config.licences is not None and _licence(instances, image_id) not in config.licences:
            continue
        try:
            found = _photograph(instances, image_id, by_image[image_id], config)
        except _UnreadableError:
            if config.on_bad_image == "stop":
                raise
            continue
        for reference, phrases in found:
            expressions = tuple(Expression(next(sent_ids), text, kind) for kind, text in phrases)
            yield replace(reference, ref_id=next(ref_ids), expressions=expressions)


class _UnreadableError(DcrisError):
    """A photograph cannot be read."""


def _photograph(
    instances: Instances, image_id: int, annotations: Sequence[dict[str, Any]], config: DataConfig
) -> list[tuple[Reference, list[tuple[str, str]]]]:
    """Return the instances of a photograph that can be described, with their phrases.

    The references have neither expressions nor an own ref_id.
    """
    if len(annotations) > _MOST_INSTANCES:
        raise bad(instances.path, f"image {image_id} has {len(annotations):,} annotations, more than {_MOST_INSTANCES}")
    pairs = [_instance(instances, image_id, annotation, config.train_split) for annotation in annotations]
    described = _with_colours([instance for _, instance in pairs], [reference for reference, _ in pairs])
    found = []
    for (reference, _), instance in zip(pairs, described, strict=True):
        if phrases := draw(statements(described, instance, config.nouns), instance.ann_id):
            found.append((reference, phrases))
    return found


def _instance(
    instances: Instances, image_id: int, annotation: dict[str, Any], split: str
) -> tuple[Reference, Instance]:
    ann_id, path = annotation["id"], instances.path
    where = f"annotation {ann_id}"
    size = instances.image_size(image_id)
    category_id = field(annotation, "category_id", int, path, where)
    if category_id not in instances.categories:
        raise bad(path, f"{where} names category {category_id}, which the file does not have")
    category = check_text(instances.category_name(category_id), path, f"category {category_id}", "name")
    if len(category) > _LONGEST_NAME:
        raise bad(path, f"category {category_id} has a 'name' of more than {_LONGEST_NAME} characters")
    box = _box(annotation, size, instances, where)
    crowd = instances.is_crowd(ann_id)
    segmentation = annotation.get("segmentation")
    try:
        area = mask_area(segmentation, size) / math.prod(size) if isinstance(segmentation, list | dict) else 0.0
    except DcrisError:  # usual in official files; no reference needs this mask
        area = 0.0
    reference = Reference(
        ref_id=0,
        ann_ids=(ann_id,),
        image_id=image_id,
        image_path=instances.image_path(image_id),
        image_size=size,
        category=category,
        split=split,
        segmentations=(segmentation if isinstance(segmentation, list | dict) else [],),
        expressions=(),
    )
    return reference, Instance(ann_id, category, box, area, vague=crowd or area == 0)


def _box(
    annotation: dict[str, Any], size: tuple[int, int], instances: Instances, where: str
) -> tuple[float, float, float, float]:
    """Return the box of an annotation as fractions of the photograph, inside of it."""
    values = field(annotation, "bbox", list, instances.path, where)
    # NaN fails the comparison, too.
    if len(values) != 4 or not all(type(value) in (int, float) and abs(value) < 1e6 for value in values):
        raise bad(instances.path, f"{where} has a 'bbox' that is not four numbers (left, top, width, height)")
    (left, top, width, height), (rows, columns) = values, size
    corners = (left / columns, top / rows, (left + width) / columns, (top + height) / rows)
    left, top, right, bottom = (min(1.0, max(0.0, value)) for value in corners)
    return left, top, max(left, right), max(top, bottom)


def _with_colours(described: Sequence[Instance], references: Sequence[Reference]) -> list[Instance]:
    """Return the instances, with their colours where these may be needed."""
    categories = describable(described)
    if not categories:
        return list(described)
    try:
        image = fit_image(read_image(references[0].image_path), references[0])
    except DcrisError as error:
        raise _UnreadableError(str(error)) from error
    if not shows_colours(image):
        return list(described)
    found = []
    for instance, reference in zip(described, references, strict=True):
        if instance.category not in categories:
            found.append(instance)
            continue
        mask = decode_mask(reference.segmentations[0], reference.image_size)
        left, top, width, height = mask_box(mask) or (0, 0, 0, 0)
        part = np.s_[top : top + height, left : left + width]
        # The edge has colours of what is behind it.
        inner = cv2.erode(mask[part], np.ones((3, 3), np.uint8))
        found.append(replace(instance, colours=colour_shares(image[part][inner > 0])))
    return found
