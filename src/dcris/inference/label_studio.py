"""Convert predictions to Label Studio's pre-annotations: brush strokes to start annotating from."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from dcris.data.tools.label_studio import brush_results
from dcris.types import MaskArray

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, even as character references: most control characters."""


def label_studio_task(image: str, results: Iterable[tuple[str, float, MaskArray]], model: str) -> dict[str, Any]:
    """Create one task with its pre-annotations.

    Args:
        image: URL of the image for Label Studio.
        results: phrase, score and mask [H, W] of each; empty masks are omitted, because they have
            no stroke.
        model: the `model_version` of the prediction.
    """
    strokes: list[Mapping[str, Any]] = []
    for number, (phrase, score, mask) in enumerate(results):
        if mask.any():
            key = region_id(f"{image}\0{number}\0{phrase}")
            strokes += brush_results(key, mask, _label(phrase), score=score)
    return {"data": {"image": image}, "predictions": [label_studio_prediction(strokes, model)]}


def label_studio_prediction(results: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Create a prediction for one task from the results of its regions; its score is their mean."""
    scores = [result["score"] for result in results]
    mean = round(sum(scores) / len(scores), 6) if scores else 0.0
    return {"model_version": model, "score": mean, "result": list(results)}


def region_id(content: str) -> str:
    """Return the identifier of a region with this content."""
    return hashlib.sha256(content.encode()).hexdigest()[:10]


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
