"""The REFER layout: a folder with a file of references, such as refs(unc).p, and instances.json.

The images are searched for below the folder above it, as when it is read as a data set.
"""

import itertools
import pickle
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dcris.data.masks import decode_mask, mask_box
from dcris.data.outlines import mask_polygons
from dcris.data.readers import refer_layout
from dcris.data.tools.annotation import Annotation, Exported, Format, Found, Size, apart, phrases_of, split_folder
from dcris.errors import DcrisError
from dcris.types import Reference, Segmentation
from dcris.utils.files import write_file, write_json


def _is_refer(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    """Return the files of references that a path means: itself, those in a folder, and those in the
    folders of data sets below."""
    if not path.is_dir():
        return [] if refer_layout.split_by_of(path.name) is None else [path]
    # Path.is_dir would ask for each image file, and os.scandir would stop at a link to itself.
    folders = (path, *sorted(file.parent for file in path.glob(f"*/{refer_layout.INSTANCES}")))
    return [file for folder in folders for file in refer_layout.find_files(folder).values()]


def _read(path: Path, content: Any) -> Found:
    found = _files(path)
    if not found:
        raise DcrisError(f"{path} is not a file of references in the REFER layout, such as refs(unc).p")
    if len(found) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in found)
        raise DcrisError(f"{path} has several partitions: {names}; give the file of one")
    (file,) = found
    folder, split_by = file.parent, refer_layout.split_by_of(file.name) or ""
    errors: list[DcrisError] = []
    instances = folder / refer_layout.INSTANCES
    table = refer_layout.load_files(file, instances, folder.parent, folder.name, split_by, errors.append)
    yield from errors
    yield from (_annotation(part, folder) for reference in table.references for part in apart(reference))


def _annotation(reference: Reference, folder: Path) -> Annotation:
    return Annotation(
        path=folder,  # the images are below the folder above it
        where=f"reference {reference.ref_id}",
        source=reference.ref_id,
        image=reference.image_path.relative_to(folder.parent).as_posix(),
        size=reference.image_size,
        masks=tuple(partial(_given, segmentation) for segmentation in reference.segmentations),
        category=reference.category or None,
        phrases=tuple(phrases_of(reference)),
        split=reference.split,
    )


def _given(segmentation: Segmentation, size: Size) -> Any:
    return segmentation


def _write(exported: Exported, folder: Path) -> None:
    """Write DATASET/refs(own).p and DATASET/instances.json.

    Masks are polygons, since REFER's own code takes nothing else. References to several objects or
    to none are those of gRefCOCO.
    """
    numbers = {image: number for number, image in enumerate(exported.images, 1)}
    categories = exported.categories()
    instances: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()],
    }
    references = list[dict[str, Any]]()
    sent_ids = itertools.count(1)
    for image, of_image in exported.by_image().items():
        height, width = of_image[0].image_size
        name = PurePosixPath(exported.images[image]).name
        instances["images"].append({"id": numbers[image], "file_name": name, "height": height, "width": width})
        for reference in (each for each in of_image if each.expressions):
            category = categories[reference.category or "object"]
            ann_ids = list[int]()
            for segmentation in reference.segmentations:
                ann_ids.append(len(instances["annotations"]) + 1)
                annotation = _instance(segmentation, reference.image_size)
                annotation |= {"id": ann_ids[-1], "image_id": numbers[image], "category_id": category, "iscrowd": 0}
                instances["annotations"].append(annotation)
            sentences = [_sentence(next(sent_ids), one.text) for one in reference.expressions]
            for sentence, expression in zip(sentences, reference.expressions, strict=True):
                if not expression.exists:
                    sentence["exist"] = False
            record = {
                "ref_id": len(references) + 1,
                "image_id": numbers[image],
                "split": reference.split,
                "file_name": name,
            }
            record |= {"sentences": sentences, "sent_ids": [each["sent_id"] for each in sentences]}
            alone = len(ann_ids) == 1
            record |= {
                "ann_id": ann_ids[0] if alone else ann_ids or [refer_layout.NO_TARGET],
                "category_id": category if alone else [category],
            }
            references.append(record)
    home = folder / (split_folder(exported.table.dataset))
    write_json(home / "instances.json", instances)
    write_file(home / "refs(own).p", pickle.dumps(references, protocol=2))


def _sentence(sent_id: int, text: str) -> dict[str, Any]:
    return {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()}


def _instance(segmentation: Segmentation, size: Size) -> dict[str, Any]:
    mask = decode_mask(segmentation, size)
    polygons = segmentation if isinstance(segmentation, list) else mask_polygons(mask)
    return {"segmentation": polygons, "area": int(np.count_nonzero(mask)), "bbox": list(mask_box(mask) or (0, 0, 0, 0))}


FORMAT = Format(
    "REFER layout (RefCOCO, gRefCOCO)",
    _read,
    is_place=_is_refer,
    write=_write,
    holds_absent=True,
    mixes_absent=True,
)
