"""Convert predictions to Label Studio's pre-annotations: brush strokes to start annotating from."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from dcris.data.brush_rle import encode_brush
from dcris.types import MaskArray

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, even as character references: most control characters."""


def label_studio_task(
    image: str, size: tuple[int, int], results: Iterable[tuple[str, float, MaskArray]], model: str
) -> dict[str, Any]:
    """Create one task with its pre-annotations.

    Args:
        image: URL of the image for Label Studio.
        size: H and W of the image, upright.
        results: phrase, score and mask of each; empty masks are omitted, because they have no
            stroke.
        model: the `model_version` of the prediction.
    """
    height, width = size
    strokes: list[Mapping[str, Any]] = []
    for number, (phrase, score, mask) in enumerate(results):
        if not mask.any():
            continue
        strokes.append(
            {
                "id": hashlib.sha256(f"{image}\0{number}\0{phrase}".encode()).hexdigest()[:10],
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": score,
                "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": [_label(phrase)]},
            }
        )
    scores = [stroke["score"] for stroke in strokes]
    mean = round(sum(scores) / len(scores), 6) if scores else 0.0
    prediction = {"model_version": model, "score": mean, "result": strokes}
    return {"data": {"image": image}, "predictions": [prediction]}


def label_studio_config(phrases: Sequence[str]) -> str:
    """Create the labelling interface: the semantic segmentation template with phrases as labels."""
    names = dict.fromkeys(_label(phrase) for phrase in phrases)
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
    )


def _label(phrase: str) -> str:
    """Return the label of a phrase for tasks and interface.

    Characters forbidden in XML become Python escapes (`\\x1b`).
    """
    return _NOT_IN_XML.sub(lambda match: ascii(match[0])[1:-1], phrase)
