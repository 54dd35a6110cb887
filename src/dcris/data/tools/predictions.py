"""predictions.json of `dcris predict`: COCO results with the phrase and the file name."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from dcris.data.table import bad, field
from dcris.data.tools.annotation import Annotation, Format, Found, each, integer, mapping, polygon_masks, texts


def _is_predictions(content: Any) -> bool:
    first = mapping(content[0]) if type(content) is list and content else {}
    return {"phrase", "segmentation", "file_name"} <= first.keys()


def _read(path: Path, content: Any) -> Found:
    if type(content) is not list:
        raise bad(path, "it is not a list of results")

    def read(place: int, record: Any) -> Annotation:
        where = f"result {place}"
        name = field(record, "file_name", str, path, where)
        if "frame" in record:
            raise bad(path, f"{where} is of a video, {name!r:.80}, whose frames are not image files")
        if record.get("percent_encoded") is True:
            name = os.fsdecode(unquote_to_bytes(name))
        return Annotation(
            path=path,
            where=where,
            source=f"{name}#{integer(record, 'phrase_number', path, where)}",
            image=name,
            size=None,
            masks=polygon_masks(record.get("segmentation")),
            phrases=texts(field(record, "phrase", str, path, where), path, where, "phrase"),
        )

    return each(read, content)


FORMAT = Format("predictions of dcris", _read, is_content=_is_predictions)
