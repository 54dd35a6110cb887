"""The formats of annotation tools, one in each module. FORMATS is the registry."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dcris.data.tools import coco, datumaro, label_studio, labelme, predictions, refer, supervisely, via, yolo
from dcris.data.tools.annotation import Annotation, Format, Found, split_of
from dcris.errors import DcrisError
from dcris.utils.files import read_json

FORMATS: dict[str, Format] = {
    "coco": coco.FORMAT,
    "label-studio": label_studio.FORMAT,
    "labelme": labelme.FORMAT,
    "via": via.FORMAT,
    "yolo": yolo.FORMAT,
    "supervisely": supervisely.FORMAT,
    "datumaro": datumaro.FORMAT,
    "refer": refer.FORMAT,
    "dcris": predictions.FORMAT,
}
"""By name, as `--format` takes them. Add a format here; docs/extending_data.md describes how."""

_MAX_FILES = 1_000_000
"""Most JSON files in a folder that are read."""


def recognise(source: Path, name: str | None = None) -> tuple[str, Found]:
    """Return the name of an export's format, and what it has, which is read on demand.

    Args:
        source: a file, or a folder, in which all JSON files of the format are read.
        name: the format; None recognises it.

    Raises:
        DcrisError: there is no such file or format, it is not recognised, or a folder has files of
            several formats. While the annotations are read: the only file cannot be read at all.
    """
    if name is not None and name not in FORMATS:
        raise DcrisError(f"there is no format {name!r}; choose from {', '.join(FORMATS)}")
    if not source.exists():
        raise DcrisError(f"the annotation file is missing: there is no file or folder {source}; check the name")
    for each, form in FORMATS.items():
        if name in (None, each) and form.is_place(source):
            return each, form.read(source, None)
    if not source.is_dir():
        content = _content(source)
        found = _format_of(content) if name is None else name
        if found is None:
            raise DcrisError(f"the format of {source} is unknown; {_ADVICE}: {', '.join(FORMATS)}")
        return found, FORMATS[found].read(source, content)
    unread: list[DcrisError] = []
    documents = _documents(source, name, unread.append)
    first = list(islice(documents, 2))
    if not first and unread:
        raise unread[0]
    if not first:
        what = "a known format" if name is None else f"the format {name}"
        raise DcrisError(
            f"{source} has no file of {what}; {_ADVICE}: {', '.join(FORMATS)}; masks that are images need no import, but a "
            "line of JSON each (docs/own_data.md)"
        )
    return first[0][0], chain(_read_all(source, chain(first, documents), several=len(first) > 1), unread)


_ADVICE = "give the file that the tool exported, or the folder with it; formats that can be read"


def _documents(
    folder: Path, name: str | None, on_error: Callable[[DcrisError], None]
) -> Iterator[tuple[str, Path, Any]]:
    """Yield format, path and content of the JSON files below a folder that have a known format, or
    that of this name. `on_error` receives the error of each that cannot be read."""
    for seen, path in enumerate(sorted(folder.rglob("*.json")), 1):
        if seen > _MAX_FILES:
            raise DcrisError(f"{folder} has more than {_MAX_FILES:,} JSON files; import its folders one by one")
        try:
            content = _content(path)
        except DcrisError as error:
            on_error(error)
            continue
        found = _format_of(content)
        if found is not None and name in (None, found):
            yield found, path, content


def _content(path: Path) -> Any:
    return read_json(path, "the annotation file")


def _format_of(content: Any) -> str | None:
    return next((name for name, form in FORMATS.items() if form.is_content(content)), None)


def _read_all(folder: Path, documents: Iterator[tuple[str, Path, Any]], several: bool) -> Found:
    """Yield the annotations of all files, with the splits of their folders.

    If the files are several, their names distinguish what has the same identifier, and a file that
    cannot be read is one error among the annotations.
    """
    first: tuple[str, Path] | None = None
    for name, path, content in documents:
        first = first or (name, path)
        if name != first[0]:
            raise DcrisError(
                f"{folder} has files of two formats, {first[1]} ({first[0]}) and {path} ({name}); give one of them, or --format"
            )
        file = path.relative_to(folder)
        split = split_of(*reversed(file.parent.parts))
        try:
            for found in FORMATS[name].read(path, content):
                if isinstance(found, Annotation):
                    source = f"{file.as_posix()}#{found.source}" if several else found.source
                    yield replace(found, source=source, split=found.split or split)
                else:
                    yield found
        except DcrisError as error:
            if not several:
                raise
            yield error
