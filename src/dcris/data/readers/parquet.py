"""Parquet, as the Hub gives out the RefCOCO family: ROOT/DATASET/**/*.parquet with the split in each file's name.

Two forms of columns are known. jxu124's are REFER's records, each with COCO's annotation and image record as JSON text, and no
pictures. lmms-lab's are made for scoring language models: pictures are within, and of an object no more than one outline.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from dcris.data.coco import CATEGORIES
from dcris.data.image_folders import image_ids
from dcris.data.images import image_size
from dcris.data.masks import validate_segmentation
from dcris.data.readers.refer import read_records
from dcris.data.table import OnError, ReferenceTable, bad, field, plain_path, read_expressions
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import open_regular, parse_json, write_file
from dcris.utils.streams import note

SPLIT_BY: Mapping[str, str] = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""Whose splits the Hub's Parquet has, by data set."""

_RECORDS = (
    "ref_id",
    "ann_id",
    "image_id",
    "category_id",
    "split",
    "file_name",
    "sentences",
    "raw_anns",
    "raw_image_info",
)
_PICTURES = ("answer", "segmentation", "file_name", "image")
_MOST_DECODED, _DECODED_PER_BYTE = 100_000_000, 20
"""Bytes that the columns of any file may have once decoded, and that each byte of it adds to that."""
_MOST_VALUES = 500_000
"""Values that a column of any file may have; each byte of it adds one."""
_BYTE_ARRAY = 6
"""The kind of text and bytes in parquet.thrift."""
_MAX_FOOTER = 30_000_000
_LIMITS = {"thrift_string_size_limit": 10_000_000, "thrift_container_size_limit": 100_000}
"""Of the footer, where a claimed length would take memory before any is read."""

_SPLIT = re.compile(r"(?:^|[-_])(train|validation|val|test[ABC]?)(?:[-_.]|$)")

Row = dict[str, Any]


def find_parquet(root: Path, dataset: str) -> dict[Path, str]:
    """The Parquet files of a data set, and what each calls its split. The folder may spell the `+` of a name as `plus`."""
    if not root.is_dir():
        return {}
    wanted = _canonical(dataset)
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _canonical(folder.name) == wanted]
    folder = next((folder for folder in folders if folder.name == dataset), folders[0] if folders else root / dataset)
    files = (
        path
        for path in sorted(folder.glob("**/*.parquet"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)  # what downloaders keep there
    )
    return {path: split_in_name(path) for path in files}


def _canonical(name: str) -> str:
    return name.lower().replace("plus", "+")


def split_in_name(path: PurePath) -> str:
    """The split that a file's name says (validation-00000-of-00001.parquet), or that of its folder (train/0000.parquet).

    Raises DcrisError where neither says any.
    """
    match = _SPLIT.search(path.name) or _SPLIT.search(path.parent.name)
    if match is None:
        raise DcrisError(
            f"{path} does not say its split; name it as the Hub does, such as validation-00000-of-00001.parquet"
        )
    return match[1]


def refer_split(dataset: str, split: str) -> str:
    """What REFER calls a split of jxu124's: `validation` is val, and the `test` of RefCOCO and RefCOCO+ is testA."""
    if split == "test" and dataset in ("refcoco", "refcoco+"):
        return "testA"
    return "val" if split == "validation" else split


def load_parquet(
    root: Path, dataset: str, split_by: str | None = None, on_error: OnError | None = None
) -> ReferenceTable:
    """Read a data set from Parquet in either form of columns.

    In lmms-lab's form, the pictures are unpacked once into `unpacked` in the data set's folder. Three things about it: of an
    object in several parts it has one part alone, so scores do not compare; identifiers are not REFER's but places in the files
    that are there; and `val` and `test` of its RefCOCO hold google's splits, too, as `dcris data check` notices by their size.

    Raises DcrisError where pyarrow is not installed, and for anything missing, malformed or contradictory, naming the file, the
    reference or row, and the field; what is wrong with a single reference goes to `on_error`, where that is given.
    """
    files = find_parquet(root, dataset)
    name = _canonical(dataset)
    by = SPLIT_BY.get(name, split_by or "parquet")
    if split_by not in (None, by):
        raise DcrisError(f"the Parquet files of {dataset} in {root} are split by {by}, not by {split_by}")
    first = next(iter(files))
    names = _columns(first)
    if names.issuperset(set(_RECORDS) - {"split", "file_name"}):
        records, content = to_refer(files, name)
        references = read_records(records, first.parent, content, first.parent, root, on_error)
    elif names.issuperset(_PICTURES):
        references = _read_pictures(files, root / first.relative_to(root).parts[0] / "unpacked")
    else:
        raise bad(
            first,
            f"it has the columns {', '.join(sorted(names))}, and those of jxu124/refcoco or lmms-lab/RefCOCO are read",
        )
    return ReferenceTable(name, by, root, references)


def to_refer(files: Mapping[Path, str], dataset: str) -> tuple[list[Row], Row]:
    """Files in jxu124's form, with the split in each one's name -> the content of `refs(...).p` and of `instances.json`.

    A row's own split counts where it has one. Nothing is checked beyond what is needed to take the rows apart: that is for
    read_records. Raises DcrisError where that is not possible.
    """
    records: list[Row] = []
    annotations: dict[int, Any] = {}
    images: dict[int, Any] = {}
    for path, split in files.items():
        for number, row in enumerate(_rows(path, _RECORDS), 1):
            where = f"row {number}"
            sentences = field(row, "sentences", list, path, where)
            record: Row = {"split": refer_split(dataset, row.pop("split", None) or split)}
            record |= {key: row[key] for key in row if not key.startswith("raw_")}
            record["sent_ids"] = [field(sentence, "sent_id", int, path, where) for sentence in sentences]
            for key, column, target in (("ann_id", "raw_anns", annotations), ("image_id", "raw_image_info", images)):
                identifier = field(row, key, int, path, where)
                if identifier not in target:
                    target[identifier] = _json(field(row, column, str, path, where), path, where, column)
            records.append(record)
    return records, {
        "images": list(images.values()),
        "annotations": list(annotations.values()),
        "categories": [{"id": identifier, "name": name} for identifier, name in CATEGORIES.items()],
    }


def _json(text: str, path: Path, where: str, key: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise bad(path, f"{where} has a '{key}' that is not JSON ({error})") from error


# ---- lmms-lab's form -----------------------------------------------------------------------------------------------------


def _read_pictures(files: Mapping[Path, str], pictures: Path) -> tuple[Reference, ...]:
    light = [column for column in _PICTURES if column != "image"]
    rows: list[tuple[Path, str, str, Row, str]] = []
    for path, split in files.items():
        found = [(f"row {number}", row) for number, row in enumerate(_rows(path, light), 1)]
        names = [_photograph(row, path, where) for where, row in found]
        _unpack(path, set(names), pictures)
        rows += [(path, where, split, row, name) for (where, row), name in zip(found, names, strict=True)]
    numbers = image_ids(name for *_, name in rows)
    sizes = {name: image_size(pictures / name) for name in numbers}
    references: list[Reference] = []
    sentences: set[int] = set()
    for number, (path, where, split, row, name) in enumerate(rows, 1):
        texts = field(row, "answer", list, path, where)
        record = {
            "sentences": [{"sent_id": len(sentences) + place, "sent": text} for place, text in enumerate(texts, 1)]
        }
        try:
            # The corners were recorded to the hundredth, and stored as 32-bit numbers: 286.76 became 286.760009765625.
            outline = [round(value, 2) for value in field(row, "segmentation", list, path, where)]
            segmentation = validate_segmentation([outline], sizes[name])
        except (DcrisError, TypeError) as error:
            raise bad(path, f"{where} has a 'segmentation' that cannot be decoded ({error})") from error
        references.append(
            Reference(
                ref_id=number,
                ann_id=number,
                image_id=numbers[name],
                image_path=pictures / name,
                image_size=sizes[name],
                category="object",  # it is not recorded
                split="val" if split == "validation" else split,
                segmentation=segmentation,
                expressions=tuple(read_expressions(record, path, where, sentences)),
            )
        )
    if not references:
        raise bad(next(iter(files)).parent, "there are no references in it")
    return tuple(references)


def _photograph(row: Row, path: Path, where: str) -> str:
    """REFER puts the annotation's number behind the photograph's: COCO_train2014_000000546154_298801.jpg."""
    name = plain_path(field(row, "file_name", str, path, where), path, where)
    return re.sub(r"(?<=_\d{12})_\d+(?=\.jpg$)", "", name)


def _unpack(path: Path, names: set[str], pictures: Path) -> None:
    """Write the photographs `names` of a file to a folder of their own: they may have been encoded anew."""
    missing = {name for name in names if not (pictures / name).is_file()}
    if not missing:
        return
    note(f"unpacking {len(missing):,} photographs of {path} into {pictures}, once")
    for number, row in enumerate(_rows(path, ("file_name", "image"), at_once=64), 1):
        where = f"row {number}"
        name = _photograph(row, path, where)
        if name in missing:
            content = field(row.get("image"), "bytes", bytes, path, f"the picture of {where}")
            try:
                image_size(content)
            except DcrisError as error:
                raise bad(path, f"{where} holds no picture ({error})") from error
            write_file(pictures / name, content)
            missing.remove(name)


# ---- pyarrow -------------------------------------------------------------------------------------------------------------


def _columns(path: Path) -> set[str]:
    with _opened(path) as file:
        return set(file.schema_arrow.names)


def _rows(path: Path, columns: Sequence[str], at_once: int = 1000) -> Iterator[Row]:
    """The rows of a file as plain data, with those of `columns` that it has.

    A few kilobytes can hold gigabytes: pages compressed a thousand times, a million rows of one value, or one long text in
    all of them. So sizes are compared with the file's before anything is decoded, texts are held once however often they are
    there (read_dictionary), and their lengths are added up before they become Python's.
    """
    with _opened(path, columns) as file:
        size = path.stat().st_size
        left = _MOST_DECODED + _DECODED_PER_BYTE * size
        for batch in file.iter_batches(at_once, columns=[name for name in columns if name in file.schema_arrow.names]):
            # A stranger's file may hold text that is none, or lists that reach beyond their end.
            batch.validate(full=True)
            left -= sum(map(_decoded_bytes, batch.columns))
            if left < 0:
                raise bad(path, f"its {size / 1e6:.1f} MB hold far more text than they could in a data set")
            yield from batch.to_pylist()


def _decoded_bytes(array: Any) -> int:
    """About what an array takes as Python's objects."""
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    if types.is_struct(kind):
        return sum(map(_decoded_bytes, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind):
        return 64 * len(array) + _decoded_bytes(array.flatten())
    if types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        return 64 * len(array) + (pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0)
    return 64 * len(array) + array.nbytes


def _text_columns(path: Path, file: BinaryIO, columns: Sequence[str]) -> list[str]:
    """The leaves of a file's columns that hold text or bytes.

    Raises DcrisError where the file says of one of `columns` that it holds far more than its size explains.
    """
    texts: dict[str, None] = {}
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - 8 - length))
    footer = _Thrift(file.read(min(length, _MAX_FOOTER)))
    # Not from pyarrow's metadata: what is odd there ends the process. The numbers are those of parquet.thrift.
    for group in footer.struct().get(4, []):
        for chunk in group.get(1, []):
            described = chunk.get(3, {})
            name = b".".join(described.get(3, [])).decode()
            if described.get(1) == _BYTE_ARRAY:
                texts[name] = None
            values, decoded = max(described.get(5, 0), group.get(3, 0)), described.get(6, 0)
            if name.partition(".")[0] in columns and (
                values > _MOST_VALUES + size or decoded > _MOST_DECODED + _DECODED_PER_BYTE * size
            ):
                raise bad(
                    path,
                    f"its column {name} holds {values:,} values in {decoded / 1e6:,.1f} MB, far more than a file of "
                    f"{size / 1e6:,.1f} MB could",
                )
    return list(texts)


class _Thrift:
    """Reads Thrift's compact protocol, in which a Parquet file's footer is written."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return value

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        key = 0
        while head := self.data[self.at]:
            self.at += 1
            key = key + (head >> 4) if head >> 4 else self.signed()
            fields[key] = head & 15 == 1 if head & 15 < 3 else self.value(head & 15, depth)
        self.at += 1
        return fields

    def signed(self) -> int:
        value = self.number()
        return value >> 1 ^ -(value & 1)

    def value(self, kind: int, depth: int) -> Any:
        if depth > 20:
            raise ValueError("its footer is nested too deeply")
        if kind in (1, 2, 3):  # in a list, true and false are bytes
            self.at += 1
            return self.data[self.at - 1]
        if kind in (4, 5, 6):
            return self.signed()
        if kind in (7, 8):
            size = 8 if kind == 7 else self.number()
            self.at += size
            return self.data[self.at - size : self.at]
        if kind in (9, 10):
            head = self.data[self.at]
            self.at += 1
            count = head >> 4 if head >> 4 < 15 else self.number()
            return [self.value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"its footer has a field of the unknown kind {kind}")


@contextmanager
def _opened(path: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """The file, as pyarrow has it, to read the columns from. What pyarrow raises about the content becomes a DcrisError."""
    require_pyarrow()
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(path) as stream:
            texts = _text_columns(path, stream, columns)
            with ParquetFile(stream, read_dictionary=texts, **_LIMITS) as file:
                yield file
    except DcrisError:
        raise
    except OSError as error:
        if error.errno is None:  # one of pyarrow's
            raise _damaged(path, error) from error
        raise DcrisError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # pyarrow's own errors, and those of decoding
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DcrisError:
    return bad(path, f"it is not a whole Parquet file ({(str(error).strip() or type(error).__name__).splitlines()[0]})")


def require_pyarrow() -> None:
    """Raise DcrisError where the library that reads Parquet is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DcrisError(
            'Parquet is read by pyarrow, which is not installed; run: pip install "pyarrow>=14.0.1"'
        ) from error
