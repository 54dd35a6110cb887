"""The REFER layout: `<root>/<dataset>/refs(<split_by>).p` and `<root>/<dataset>/instances.json`.

Generalised data sets have the same layout. What they add is read in any data set:
- gRefCOCO: the file is `grefs(unc).json`, or `.p`. `ann_id` is a list, [-1] for expressions without
  a target; crowds in it are not part of the target. Source: gres_model/data/datasets/grefer.py and
  grefcoco.py of ReLA.
- Ref-ZOM: `refs(final).p`, downloaded as `Ref-ZOM(final).p`. `ann_id` may be a list, and the
  `source` "zero" stands for no target. Source: refer/refer.py of RIS-DMMI.
- R-RefCOCO, R-RefCOCO+, R-RefCOCOg: a sentence whose `exist` is false has no target.
  Source: dataset/ReferDataset.py of robust-ref-seg.
- RRSIS-D: `segmentation` is a list of one mask in run lengths. Some images have 800 x 801 or
  800 x 787 pixels but masks of 800 x 800; both are resized to a square, so here the image is
  resized to the mask's size. Source: refer/refer.py and data/dataset_refer_bert.py of RMSIN.

The files come from mirrors of unknown origin. A pickle could run code, so only plain data is
admitted.
"""

import io
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, NoReturn

from dcris.data.coco import ImageFolder, find_images
from dcris.data.masks import only_mask, validate_segmentation
from dcris.data.registry import DATASETS
from dcris.data.table import (
    MAX_OBJECTS,
    OnError,
    ReferenceTable,
    bad,
    field,
    index_by_id,
    located,
    path_field,
    read_expressions,
    shown,
    size_field,
    skip_errors,
    text_field,
)
from dcris.errors import DcrisError
from dcris.types import Reference, Segmentation
from dcris.utils.files import read_bytes, read_json, reading
from dcris.utils.pickles import InstructionError, end_of_pickle, global_name

_MAX_PICKLE = 256_000_000
"""Bytes. The largest official file has about 30 MB."""

_NAME = re.compile(r"(?:refs|grefs|Ref-ZOM)\((.*)\)\.(?:p|json)|Ref_ZOM\.p")
"""Names of the file of references; the group is its `split_by`. Without one it is Ref-ZOM's,
"final"."""

INSTANCES = "instances.json"

NO_TARGET = -1
"""The only entry in the `ann_id` of a reference of gRefCOCO without a target."""

_ZERO = "zero"
"""`source` of a reference of Ref-ZOM without a target."""

_PLAIN_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS "
    "EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE"
)
_PLAIN = frozenset(_PLAIN_NAMES.split())
"""Pickle instructions that build containers, strings and numbers; all others call, import or load
objects."""


class _PlainUnpickler(pickle.Unpickler):
    """A second line of defence: no admitted instruction requests a class, and none is given out."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def safe_unpickle(path: Path) -> Any:
    """Read a pickle of containers, strings and numbers, written by Python 2 or 3.

    All instructions are checked before any is executed.

    Raises:
        DcrisError: the file is missing, damaged or too large, would need far more memory than its
            size explains, or contains anything else, above all a request to run code.
    """
    with reading(path, "check the folder and the name, or download the file"):
        data = read_bytes(path, _MAX_PICKLE)
    try:
        end_of_pickle(data, admitted=_PLAIN)
        return _unpickle(data)
    except InstructionError as error:
        raise DcrisError(
            f"{path} asks to {_describe_request(data, error.name)}: do not trust it; download it again from a trusted source"
        ) from error
    except Exception as error:  # a damaged pickle makes the readers raise nearly any error
        raise DcrisError(
            f"{path} is not a whole pickle ({error}); it may be cut short, so download it again"
        ) from error


def _unpickle(data: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except UnicodeDecodeError:  # byte strings of Python 2 have no declared encoding
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


def _describe_request(data: bytes, name: str) -> str:
    """Describe what the first instruction of that name requests."""
    words: list[str] = ["", ""]
    with suppress(ValueError):  # a damaged string before the instruction
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name == name and name != "STACK_GLOBAL":
                words = str(argument).split(" ", 1)
            if instruction.name == name:
                break
            if "UNICODE" in instruction.name:
                words = [words[1], str(argument)]
    if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
        return f"run code ({global_name(*words)})"
    if name in ("PERSID", "BINPERSID"):
        return "load an object from outside the file"
    return f"execute an instruction that plain data does not need ({name})"


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the `split_by` of each file `<root>/<dataset>/refs(<split_by>).p`; see Reader.find."""
    return [name for name in find_files(root / dataset) if split_by in (None, name)]


def find_files(folder: Path) -> dict[str, Path]:
    """Return the files of references in the folder of a data set by their `split_by`.

    A pickle comes before a JSON file, as in the code of gRefCOCO.
    """
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder), reverse=True) if folder.is_dir() else ():  # noqa: PTH208
        if (split_by := split_by_of(name)) is not None:
            found.setdefault(split_by, folder / name)
    return dict(sorted(found.items()))


def split_by_of(name: str) -> str | None:
    """Return the `split_by` in the name of a file of references; None for any other name."""
    match = _NAME.fullmatch(name)
    return (match[1] or "final") if match else None


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read a data set in the REFER layout; see Reader.load. Only a few images are searched for."""
    path = find_files(root / dataset)[split_by]
    return load_files(path, root / dataset / INSTANCES, root, dataset, split_by, on_error)


def load_files(
    path: Path, instances: Path, root: Path, dataset: str, split_by: str, on_error: OnError | None = None
) -> ReferenceTable:
    """Read a data set from a file of references and one of instances, which may be anywhere.

    Images are searched for below `root`. The other arguments and errors are those of Reader.load.
    """
    what = f"of {dataset}"
    records = read_json(path, f"the references {what}") if path.suffix == ".json" else safe_unpickle(path)
    content = read_json(instances, f"the annotation file {what}", _drop_unused(records))
    facts = DATASETS.get(dataset)
    usual, stretched = (None, False) if facts is None else (facts.image_folder, facts.stretched)
    found = read_records(records, path, Instances.read(content, instances, root, usual), on_error)
    if stretched:
        found = tuple(replace(reference, stretched=True) for reference in found)
    return ReferenceTable(dataset, split_by, root, found, _notes(records))


def _notes(records: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return a note if a sentence's `raw`, which many codes read, has other words than its `sent`.

    Case and spaces do not count: tokenizers remove them.
    """
    pairs = ((each.get("raw"), each["sent"]) for record in records for each in _sentences(record))
    differing = [(raw, sent) for raw, sent in pairs if type(raw) is str and raw.lower().split() != sent.lower().split()]
    if not differing:
        return ()
    raw, sent = differing[0]
    return (
        f"{len(differing):,} sentences have a 'raw' that differs from 'sent', such as {shown(raw)} and {shown(sent)}; 'sent' "
        "is read, as by CRIS and LISA; LAVT, ReLA, DMMI, RefSegformer and RMSIN read 'raw'",
    )


def _sentences(record: Any) -> list[dict[str, Any]]:
    """Return the sentences of a record that may have been refused."""
    found = record.get("sentences") if type(record) is dict else None
    found = found if type(found) is list else []
    return [each for each in found if type(each) is dict and type(each.get("sent")) is str]


def read_instances(root: Path, dataset: str, each_object: Callable[[dict[str, Any]], Any] | None = None) -> "Instances":
    """Read `<root>/<dataset>/instances.json`.

    Args:
        root: folder of the data sets.
        dataset: name of the data set.
        each_object: JSON object hook, see `parse_json`.

    Raises:
        DcrisError: the file is missing, is not JSON, or lacks one of its lists.
    """
    path = root / dataset / INSTANCES
    return Instances.read(read_json(path, f"the annotation file of {dataset}", each_object), path, root)


def _drop_unused(records: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a JSON object hook that drops the content of annotations that no record refers to.

    In the official files these are three quarters of the annotations.
    """
    found = (record.get("ann_id") for record in (records if type(records) is list else ()) if type(record) is dict)
    used = {each for ann_id in found for each in (ann_id if type(ann_id) is list else [ann_id]) if type(each) is int}

    def drop(record: dict[str, Any]) -> dict[str, Any]:
        ann_id = record.get("id")
        unused = "segmentation" in record and type(ann_id) is int and ann_id not in used
        return {"id": ann_id} if unused else record

    return drop


def read_records(
    records: Any, path: Path, instances: "Instances", on_error: OnError | None = None
) -> tuple[Reference, ...]:
    """Return the references of REFER's records and COCO's annotations.

    Args:
        records: content of `refs(...).p`, a list of references.
        path: its file, for errors.
        instances: the images, annotations and categories that they refer to.
        on_error: receives the error of each reference that cannot be used, which is then skipped.

    Raises:
        DcrisError: as Reader.load.
    """
    if type(records) is not list or not records:
        raise bad(path, "it is not a list of references")
    references: dict[int, Reference] = {}
    sentences: set[int] = set()
    for number, record in enumerate(records, 1):
        with skip_errors(on_error):
            ref_id = field(record, "ref_id", int, path, f"entry {number}")
            if ref_id in references:
                raise bad(path, f"reference {ref_id} occurs twice")
            references[ref_id] = _read_reference(record, ref_id, instances, path, sentences)
    return tuple(references.values())


@dataclass(frozen=True)
class Instances:
    """Content of `instances.json` in COCO's format, indexed by identifier.

    Only identifiers are checked when it is read; the methods check what they return, and raise
    DcrisError.
    """

    path: Path
    """The file, for errors."""
    image_folder: ImageFolder
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]
    valid: set[int] = dataclass_field(default_factory=set)
    """Annotations whose mask has been validated. In gRefCOCO, several references share each."""

    @classmethod
    def read(cls, content: Any, path: Path, root: Path, usual: str | None = None) -> "Instances":
        """Return the instances of a parsed file. Images are searched for below `root`, in its
        `usual` folder first."""
        images, annotations, categories = (
            index_by_id(field(content, key, list, path, "the file"), key, path)
            for key in ("images", "annotations", "categories")
        )
        # A hundred names: if only some splits were downloaded, any single image may be missing.
        names = (_file_name(image, path) for image in list(images.values())[:: 1 + len(images) // 100])
        return cls(path, find_images(root, names, usual), images, annotations, categories)

    def image_path(self, image_id: int) -> Path:
        """Return the path of an image; the file may be missing."""
        return self.image_folder.path(_file_name(self.images[image_id], self.path))

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Return the annotated height and width of an image in pixels."""
        return size_field(self.images[image_id], self.path, f"image {image_id}")

    def is_crowd(self, ann_id: int) -> bool:
        """Return whether an annotation covers a crowd of objects."""
        annotation = self.annotations[ann_id]
        return "iscrowd" in annotation and field(annotation, "iscrowd", int, self.path, f"annotation {ann_id}") != 0

    def segmentation(self, ann_id: int, size: tuple[int, int], where: str) -> Segmentation:
        """Return the mask of an annotation, for an image of `size` (H, W); `where` names its
        reference."""
        segmentation: Any = self.annotations[ann_id].get("segmentation")
        if ann_id in self.valid:
            return segmentation
        if not segmentation:
            raise bad(self.path, f"annotation {ann_id} of {where} has no 'segmentation'")
        segmentation = self.annotations[ann_id]["segmentation"] = only_mask(segmentation)
        with located(self.path, f"annotation {ann_id} of {where} cannot be decoded"):
            validate_segmentation(segmentation, size)
        self.valid.add(ann_id)
        return segmentation

    def category_name(self, category_id: int) -> str:
        """Return the name of a category."""
        return field(self.categories[category_id], "name", str, self.path, f"category {category_id}")


def _read_reference(record: Any, ref_id: int, instances: Instances, path: Path, sentences: set[int]) -> Reference:
    where = f"reference {ref_id}"
    ann_ids = _annotation_ids(record, path, where)
    image_id = field(record, "image_id", int, path, where)
    split = text_field(record, "split", path, where)
    if image_id not in instances.images:
        raise bad(path, f"{where} names image {image_id}, which {instances.path.name} does not have")
    for ann_id in ann_ids:
        if ann_id not in instances.annotations:
            raise bad(path, f"{where} names annotation {ann_id}, which {instances.path.name} does not have")
        owner = field(instances.annotations[ann_id], "image_id", int, instances.path, f"annotation {ann_id}")
        if owner != image_id:
            raise bad(path, f"{where} names image {image_id}, but its annotation {ann_id} belongs to image {owner}")
    if ann_ids and not _is_plain(record):
        ann_ids = [ann_id for ann_id in ann_ids if not instances.is_crowd(ann_id)]
        if not ann_ids:
            raise bad(path, f"{where} has only crowds in its 'ann_id', which are not part of a target")
    size = instances.image_size(image_id)
    return Reference(
        ref_id=ref_id,
        ann_ids=tuple(ann_ids),
        image_id=image_id,
        image_path=instances.image_path(image_id),
        image_size=size,
        category=_category(record, ann_ids, instances, path, where),
        split=split,
        segmentations=tuple(instances.segmentation(ann_id, size, where) for ann_id in ann_ids),
        expressions=tuple(read_expressions(record, path, where, sentences)),
    )


def _annotation_ids(record: dict[str, Any], path: Path, where: str) -> list[int]:
    """Return the different annotations that a reference names; none if it has no target."""
    if _is_plain(record):
        return [field(record, "ann_id", int, path, where)]
    named = record.get("ann_id")
    if record.get("source") == _ZERO or named in ([], [NO_TARGET]):
        return []
    ann_ids = field(record, "ann_id", list, path, where)
    if len(ann_ids) > MAX_OBJECTS:
        raise bad(path, f"{where} has an 'ann_id' of {len(ann_ids):,} annotations; the limit is {MAX_OBJECTS:,}")
    return list(dict.fromkeys(field({"ann_id": each}, "ann_id", int, path, where) for each in ann_ids))


def _is_plain(record: dict[str, Any]) -> bool:
    """Return whether a reference has one object, as all have in REFER's own data sets."""
    return type(record.get("ann_id")) is not list and record.get("source") != _ZERO


def _category(record: dict[str, Any], ann_ids: Sequence[int], instances: "Instances", path: Path, where: str) -> str:
    """Return the names of a reference's categories.

    The `category_id` of several objects, or of none, has several forms or is missing; then the
    names are those of the annotations.
    """
    if _is_plain(record):
        ids = [field(record, "category_id", int, path, where)]
    else:
        file = instances.path
        ids = [field(instances.annotations[each], "category_id", int, file, f"annotation {each}") for each in ann_ids]
    for category_id in ids:
        if category_id not in instances.categories:
            raise bad(path, f"{where} names category {category_id}, which {instances.path.name} does not have")
    return ", ".join(instances.category_name(category_id) for category_id in dict.fromkeys(ids))


def _file_name(image: dict[str, Any], path: Path) -> str:
    where = f"image {image['id']}"
    return path_field(image, "file_name", path, where)
