"""RefSegRS: ROOT/RefSegRS/output_phrase_SPLIT.txt with lines `<id> <phrase>`.

The image is images/<id>.tif, the mask masks/<id>.tif, where every value above 0 is the object. (One
published loader takes values above 50 instead; masks of two values give the same.) The folder may
be called refsegrs, too.
Source: https://github.com/zhu-xlab/rrsis, and the loaders of LGCE, RMSIN and FIANet.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dcris.data.images import image_size
from dcris.data.registry import OFFICIAL
from dcris.data.table import SPLIT_STEP, OnError, ReferenceTable, bad, check_text, plain_name, shown, skip_errors
from dcris.types import Expression, Reference, SoftMask
from dcris.utils.files import read_text, reading

_FOLDERS = ("RefSegRS", "refsegrs")
_FILE = "output_phrase_{}.txt"
_SPLITS = ("train", "val", "test")
_LINE = re.compile(r"(\S+)\s+(\S.*)")
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
_LONGEST = 16_000_000
"""Bytes of a file of phrases; the largest official one has about 0.1 MB."""


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the only partition if a file of phrases exists; see Reader.find."""
    return [OFFICIAL] if split_by in (None, OFFICIAL) and _home(root) is not None else []


def _home(root: Path) -> Path | None:
    homes = (root / name for name in _FOLDERS)
    return next((home for home in homes if any((home / _FILE.format(split)).is_file() for split in _SPLITS)), None)


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read RefSegRS; see Reader.load.

    The size of an image is that of its mask, read from the header. Where all ids are different
    whole numbers, as in the official files, they are the numbers of references, images and
    expressions. Lines with the same id are expressions of one reference, whose masks are then
    named by sent_id, others by id.
    """
    home = _home(root)
    assert home is not None
    phrases: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for split in _SPLITS:
        path = home / _FILE.format(split)
        if not path.is_file():
            continue
        with reading(path):
            lines = read_text(path, _LONGEST).splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            with skip_errors(on_error):
                match = _LINE.fullmatch(line.strip())
                if match is None:
                    raise bad(path, f"{where} is not an id and a phrase: {shown(line)}")
                name = plain_name(match[1], path, where, "id")
                phrases[split, name].append(check_text(match[2], path, where, "phrase"))
    official = _are_numbers([name for (_, name), texts in phrases.items() for _ in texts])
    numbers, sent_ids = _counters(), _counters()
    references: list[Reference] = []
    for (split, name), texts in phrases.items():
        number = int(name) if official else next(numbers[split])
        numbered = [(number if official else next(sent_ids[split]), text) for text in texts]
        with skip_errors(on_error):
            mask = home / "masks" / f"{name}.tif"
            references.append(
                Reference(
                    ref_id=number,
                    ann_ids=(number,),
                    image_id=number,
                    image_path=home / "images" / f"{name}.tif",
                    image_size=image_size(mask),
                    category="object",
                    split=split,
                    segmentations=(SoftMask(mask, 0),),
                    expressions=tuple(
                        Expression(sent_id, text, name=name if len(texts) == 1 else None) for sent_id, text in numbered
                    ),
                )
            )
    return ReferenceTable(dataset, split_by, root, tuple(references))


def _counters() -> dict[str, "itertools.count[int]"]:
    return {split: itertools.count(place * SPLIT_STEP + 1) for place, split in enumerate(_SPLITS)}


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether names are whole numbers, each written in one way and only once."""
    return len({*names}) == len(names) and all(_NUMBER.fullmatch(name) for name in names)
