"""One's own data: JSON Lines, one reference a line.

    {"image": "img/1.jpg", "mask": "m/1.png", "expressions": ["left cup", "the cup on the left"], "split": "train"}

`mask` is the path of a picture of two values, 0 and another for the object, or COCO's polygons [[x, y, x, y, ...], ...] or run
lengths {"size": [H, W], "counts": ...}. Paths are relative to the file and do not lead out of its folder. `split` is train
where it is missing. `category` (text) and `id` (a whole number) may be given; unknown fields are ignored.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcris.data.images import image_size
from dcris.data.masks import validate_segmentation
from dcris.data.table import OnError, ReferenceTable, bad, check_text, forgiving, plain_path
from dcris.data.table import field as entry
from dcris.errors import DcrisError
from dcris.types import Expression, Reference, Segmentation
from dcris.utils.files import read_json_lines


def is_jsonl(root: Path) -> bool:
    """Whether a path means a data set in one file of JSON Lines, which is called by the file's name."""
    return root.suffix.lower() == ".jsonl"


def load_jsonl(path: Path, on_error: OnError | None = None) -> ReferenceTable:
    """Read a data set of one's own. Its name is the file's stem.

    A reference's `ref_id` is its `id`, or else the number of its line; sentences and distinct photographs are numbered in the
    order in which they come. Of each photograph, and each mask that is a picture, the header is read.

    Args:
        path: the file.
        complain: receives the error of each line that is wrong, which is then left out.

    Raises DcrisError where the file cannot be read or holds nothing, and, without `on_error`, for the first line that is wrong.
    """
    reader, references, complaints = _Reader(path), [], 0

    def count(error: DcrisError) -> None:
        nonlocal complaints
        if on_error is None:
            raise error
        complaints += 1
        on_error(error)

    for number, record in read_json_lines(path, count):
        with forgiving(count):
            references.append(reader.reference(record, number))
    if not references and not complaints:
        raise bad(path, "it holds no references")
    return ReferenceTable(path.stem, "own", path, tuple(references))


@dataclass
class _Reader:
    """What has been seen of a file so far."""

    path: Path
    images: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    """Number and size (H, W) of each photograph."""
    lines: dict[int, int] = field(default_factory=dict)
    """The line of each `ref_id`."""
    sentences: int = 0

    def reference(self, record: Any, number: int) -> Reference:
        """The reference that the value of a line spells out. Raises DcrisError where it does not."""
        where, path = f"line {number}", self.path
        name = self._relative(entry(record, "image", str, path, where), where, "image")
        if name not in self.images:
            self.images[name] = (len(self.images) + 1, self._size(path.parent / name, where))
        image_id, size = self.images[name]
        segmentation = self._segmentation(record, size, where)
        texts = entry(record, "expressions", list, path, where)
        if not texts:
            raise bad(path, f"{where} has an empty 'expressions'")
        for text in texts:
            if type(text) is not str:
                raise bad(path, f"{where} has 'expressions' that are not all text")
            check_text(text, path, where, "expressions")
        split, category = (
            check_text(entry(record, key, str, path, where), path, where, key) if key in record else default
            for key, default in (("split", "train"), ("category", "object"))
        )
        ref_id = entry(record, "id", int, path, where) if "id" in record else number
        other = self.lines.setdefault(ref_id, number)
        if other != number:
            raise bad(
                path,
                f"{where} has the id {ref_id}, which is that of line {other}; give each line its own, or none an id",
            )
        first = self.sentences + 1
        self.sentences += len(texts)
        return Reference(
            ref_id=ref_id,
            ann_id=ref_id,
            image_id=image_id,
            image_path=path.parent / name,
            image_size=size,
            category=category,
            split=split,
            segmentation=segmentation,
            expressions=tuple(Expression(sent_id, text) for sent_id, text in enumerate(texts, first)),
        )

    def _relative(self, name: str, where: str, key: str) -> str:
        return plain_path(name, self.path, where, key)

    def _size(self, image: Path, where: str) -> tuple[int, int]:
        try:
            return image_size(image)
        except DcrisError as error:
            raise DcrisError(f"{self.path}: {where}: {error}") from error

    def _segmentation(self, record: dict[str, Any], size: tuple[int, int], where: str) -> Segmentation:
        mask = record.get("mask")
        if mask is None:
            raise bad(self.path, f"{where} has no 'mask'")
        if type(mask) is str:
            mask = self.path.parent / self._relative(mask, where, "mask")
        try:
            return validate_segmentation(mask, size)
        except DcrisError as error:
            raise bad(self.path, f"{where} has a 'mask' that does not fit ({error})") from error
