"""Parquet files as repositories on the Hub have them: ROOT/DATASET/**/*.parquet.

Each file name contains the split. In jxu124's, rows are REFER's records, each with COCO's
annotation and image record as JSON text; the images are not included. In RefCOCO-M
(moondream/refcoco-m), a row is an image with all its objects (`samples`); the images, which are in
the file, are read by `embedded_images`, and else looked for among COCO's.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from dcris.data.coco import CATEGORIES
from dcris.data.readers.refer_layout import Instances, read_records
from dcris.data.registry import DATASETS
from dcris.data.table import OnError, ReferenceTable, bad, field, path_field
from dcris.errors import DcrisError, first_line
from dcris.utils.files import open_regular, parse_json

_REQUIRED = ("ref_id", "ann_id", "image_id", "category_id", "sentences", "raw_anns", "raw_image_info")
_COLUMNS = (*_REQUIRED, "split", "file_name")
"""Columns that are read."""
_OF_IMAGES = ("image_id", "file_name", "samples")
"""Those of RefCOCO-M."""
_MAX_IMAGE = 50_000_000
"""Bytes of an image in a file."""
_MAX_DECODED, _DECODED_PER_BYTE = 100_000_000, 20
"""Limit on the decoded bytes of a column: a constant, and a number for each byte of the file."""
_MAX_VALUES = 500_000
"""Limit on the values of a column, plus one for each byte of the file."""
_BYTE_ARRAY = 6
"""Physical type of text and bytes in parquet.thrift."""
_MAX_FOOTER = 30_000_000
_FOOTER_LIMITS = {"thrift_string_size_limit": 10_000_000, "thrift_container_size_limit": 100_000}
"""Without limits, a length that the footer claims would allocate memory before anything is read."""

_SPLIT = re.compile(r"(?:^|[-_])(train|validation|val|test[ABC]?)(?:[-_.]|$)")

Row = dict[str, Any]


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the partition of a data set in Parquet; see Reader.find.

    The Hub's copies have the usual partition; other data sets may have any.
    """
    if not _find_files(root, dataset):
        return []
    known = DATASETS.get(_canonical(dataset))
    usual = (split_by or "parquet") if known is None else known.split_by
    return [usual] if split_by in (None, usual) else []


def _find_files(root: Path, dataset: str) -> dict[Path, str]:
    """Return the Parquet files of a data set, with the split in each name.

    The folder may spell `+` as `plus`.
    """
    if not root.is_dir():
        return {}
    folder, wanted = root / dataset, _canonical(dataset)
    if not folder.is_dir():  # only then, since a folder can have many files
        spelt = (each for each in root.iterdir() if _canonical(each.name) == wanted and each.is_dir())
        folder = min(spelt, default=folder)
    files = (
        path
        for path in sorted(folder.glob("**/*.parquet"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)  # metadata of downloaders
    )
    return {path: split_in_name(path) for path in files}


def _canonical(name: str) -> str:
    return name.lower().replace("plus", "+")


def split_in_name(path: PurePath) -> str:
    """Return the split in a file's name, or else in its folder's.

    Examples: validation-00000-of-00001.parquet, train/0000.parquet. Raises DcrisError if neither
    contains one.
    """
    match = _SPLIT.search(path.name) or _SPLIT.search(path.parent.name)
    if match is None:
        raise DcrisError(
            f"the name of {path} does not contain a split; rename it as on the Hub, such as validation-00000-of-00001.parquet"
        )
    return match[1]


def refer_split(dataset: str, split: str) -> str:
    """Return REFER's name of a split in jxu124's repositories.

    `validation` is val, and the `test` of RefCOCO and RefCOCO+ is testA.
    """
    if split == "test" and dataset in ("refcoco", "refcoco+"):
        return "testA"
    return "val" if split == "validation" else split


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read a data set from Parquet; see Reader.load.

    Raises DcrisError also if pyarrow is not installed.
    """
    files = _find_files(root, dataset)
    name = _canonical(dataset)
    first = next(iter(files))
    with _open_parquet(first) as file:
        columns = set(file.schema_arrow.names)
    by_image = set(_OF_IMAGES) <= columns
    if (missing := set(_REQUIRED) - columns) and not by_image:
        raise bad(
            first,
            f"it lacks the columns {', '.join(sorted(missing))} of jxu124/refcoco and has {', '.join(sorted(columns))}",
        )
    records, content = images_to_refer(files) if by_image else to_refer(files, name)
    references = read_records(records, first.parent, Instances.read(content, first.parent, root), on_error)
    return ReferenceTable(name, split_by, root, references)


def to_refer(files: Mapping[Path, str], dataset: str) -> tuple[list[Row], Row]:
    """Convert Parquet files to the content of `refs(...).p` and of `instances.json`.

    The fields are checked by read_records, not here.

    Args:
        files: the files, with the split in each name. A row's own split takes precedence.
        dataset: canonical name of the data set.

    Raises:
        DcrisError: a row cannot be converted.
    """
    records: list[Row] = []
    annotations: dict[int, Any] = {}
    images: dict[int, Any] = {}
    for path, split in files.items():
        for number, row in enumerate(_read_rows(path, _COLUMNS), 1):
            where = f"row {number}"
            sentences = field(row, "sentences", list, path, where)
            record: Row = {"split": refer_split(dataset, row.pop("split", None) or split)}
            record |= {key: row[key] for key in row if not key.startswith("raw_")}
            record["sent_ids"] = [field(sentence, "sent_id", int, path, where) for sentence in sentences]
            for key, column, target in (("ann_id", "raw_anns", annotations), ("image_id", "raw_image_info", images)):
                identifier = field(row, key, int, path, where)
                if identifier not in target:
                    target[identifier] = _parse_json(field(row, column, str, path, where), path, where, column)
            records.append(record)
    return records, {
        "images": list(images.values()),
        "annotations": list(annotations.values()),
        "categories": [{"id": identifier, "name": name} for identifier, name in CATEGORIES.items()],
    }


def images_to_refer(files: Mapping[Path, str]) -> tuple[list[Row], Row]:
    """Convert the Parquet files of RefCOCO-M as `to_refer` does, each sample to a reference.

    Sentences have no identifiers there; they are numbered from 1. Raises DcrisError if a row cannot
    be converted.
    """
    records: list[Row] = []
    annotations: list[Row] = []
    images: list[Row] = []
    numbers = {name: number for number, name in CATEGORIES.items()}
    new = itertools.count(1 + max(CATEGORIES))
    sentences = 0
    for path, split in files.items():
        for number, row in enumerate(_read_rows(path, _OF_IMAGES), 1):
            where = f"row {number}"
            image_id, name = field(row, "image_id", int, path, where), field(row, "file_name", str, path, where)
            size: Any = None
            for sample in field(row, "samples", list, path, where):
                ref_id = field(sample, "id", int, path, f"a sample of {where}")
                place = f"sample {ref_id} of {where}"
                category = field(sample, "category", str, path, place)
                if category not in numbers:
                    numbers[category] = next(new)
                texts = field(sample, "sentences", list, path, place)
                mask = field(sample, "mask", dict, path, place)
                found = field(mask, "size", list, path, place)
                if len(found) != 2 or size not in (None, found):
                    raise bad(path, f"{place} has a mask whose size is not that of its image's other masks: {found}")
                size = found
                annotations.append(
                    {"id": ref_id, "image_id": image_id, "category_id": numbers[category], "segmentation": mask}
                )
                records.append(
                    {
                        "ref_id": ref_id,
                        "ann_id": ref_id,
                        "image_id": image_id,
                        "category_id": numbers[category],
                        "file_name": name,
                        "split": "val" if split == "validation" else split,
                        "sentences": [
                            {"sent_id": sent_id, "sent": text} for sent_id, text in enumerate(texts, sentences + 1)
                        ],
                        "sent_ids": list(range(sentences + 1, sentences + 1 + len(texts))),
                    }
                )
                sentences += len(texts)
            if size is not None:
                images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
    return records, {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": identifier, "name": name} for name, identifier in numbers.items()],
    }


def embedded_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the file name and the content of each image in a Parquet file of RefCOCO-M.

    Raises DcrisError if a row has no image, or one of more than 50 MB.
    """
    with _open_parquet(path, ("file_name", "image")) as file:
        for batch in file.iter_batches(8, columns=["file_name", "image"]):
            batch.validate(full=True)
            for row in batch.to_pylist():
                name = path_field(row, "file_name", path, "a row")
                content = field(field(row, "image", dict, path, name), "bytes", bytes, path, name)
                if len(content) > _MAX_IMAGE:
                    raise bad(path, f"the image {name} has {len(content) / 1e6:,.0f} MB; the limit is 50")
                yield name, content


def _parse_json(text: str, path: Path, where: str, key: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise bad(path, f"{where} has a '{key}' that is not JSON ({error})") from error


# ---- pyarrow -------------------------------------------------------------------------------------


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file as plain data, with those of `columns` that it has.

    A few kilobytes can decode to gigabytes: pages compressed a thousandfold, a million rows of one
    value, or one long text in all of them. So the sizes are compared with the file's size before
    anything is decoded, equal texts are held once (read_dictionary), and their lengths are added up
    before they become Python objects.
    """
    with _open_parquet(path, columns) as file:
        size = path.stat().st_size
        left = _MAX_DECODED + _DECODED_PER_BYTE * size
        for batch in file.iter_batches(1000, columns=[name for name in columns if name in file.schema_arrow.names]):
            # A damaged file may contain invalid UTF-8, or lists that reach beyond their end.
            batch.validate(full=True)
            left -= sum(map(_decoded_bytes, batch.columns))
            if left < 0:
                raise bad(path, f"its {size / 1e6:.1f} MB contain far more text than a data set of that size could")
            yield from batch.to_pylist()


def _decoded_bytes(array: Any) -> int:
    """Estimate the bytes that an array needs as Python objects."""
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
    """Return the leaf columns of a file that contain text or bytes.

    Raises DcrisError if one of `columns` is recorded to be far larger than the file's size
    explains.
    """
    texts: dict[str, None] = {}
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - 8 - length))
    footer = _ThriftReader(file.read(min(length, _MAX_FOOTER)))
    # pyarrow's own metadata are not used: invalid values there end the process. The numbers are
    # field identifiers of parquet.thrift.
    for group in footer.struct().get(4, []):
        for chunk in group.get(1, []):
            described = chunk.get(3, {})
            name = b".".join(described.get(3, [])).decode()
            if described.get(1) == _BYTE_ARRAY:
                texts[name] = None
            values, decoded = max(described.get(5, 0), group.get(3, 0)), described.get(6, 0)
            if name.partition(".")[0] in columns and (
                values > _MAX_VALUES + size or decoded > _MAX_DECODED + _DECODED_PER_BYTE * size
            ):
                raise bad(
                    path,
                    f"its column {name} has {values:,} values in {decoded / 1e6:,.1f} MB, far more than a file of "
                    f"{size / 1e6:,.1f} MB could",
                )
    return list(texts)


class _ThriftReader:
    """Decodes Thrift's compact protocol, the encoding of a Parquet file's footer."""

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
        if kind in (1, 2, 3):  # in a list, booleans take a byte each
            self.at += 1
            return self.data[self.at - 1]
        if kind in (4, 5, 6):
            return self.signed()
        if kind in (7, 8):
            size = 8 if kind == 7 else self.number()
            self.at += size
            if self.at > len(self.data):  # a list may claim any number of such values
                raise ValueError("its footer is cut short")
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
def _open_parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """Open a file with pyarrow, to read `columns`. Errors of pyarrow become DcrisError."""
    require_pyarrow()
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(path) as stream:
            texts = _text_columns(path, stream, columns)
            with ParquetFile(stream, read_dictionary=texts, **_FOOTER_LIMITS) as file:
                yield file
    except DcrisError:
        raise
    except OSError as error:
        if error.errno is None:  # raised by pyarrow
            raise _damaged(path, error) from error
        raise DcrisError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # pyarrow's own errors, and decoding errors
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DcrisError:
    return bad(path, f"it is not a whole Parquet file ({first_line(error)})")


def require_pyarrow() -> None:
    """Raise DcrisError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DcrisError(
            'reading Parquet needs pyarrow, which is not installed; run: pip install "pyarrow>=14.0.1"'
        ) from error
