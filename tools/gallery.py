"""Draw the images of docs/gallery.md: `python tools/gallery.py runs/quickstart docs/images`, and
`python tools/gallery.py photos docs/images`.

For each kind of expression, the first test scenes that have one are shown, without selection: the
true mask in blue, the predicted mask in orange. Of the model `photos`, the example photographs are
shown with its masks for their phrases, and for phrases that it fails at.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dcris import Segmenter
from dcris.data.images import read_image
from dcris.data.masks import union_mask
from dcris.data.photographs import example_photographs
from dcris.data.readers.load import load_references
from dcris.data.scene_phrases import KINDS
from dcris.errors import DcrisError
from dcris.types import Expression, MaskArray, Reference
from dcris.utils.drawing import COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR, cell, jpeg_bytes, mask_cell, overlay

SCENES = 3
FAILURES = {
    "astronaut.jpg": ("flag", "mug"),
    "chelsea.jpg": ("left ear", "dog"),
    "coffee.jpg": ("pizza",),
}
"""Phrases that `photos` fails at: words that it was not trained on, parts of things, and things
that are not there."""
SIDE, GAP, LETTERS = 150, 6, 14
SHARP = 2  # photographs are stored at twice the size of the page, for screens with small pixels
PHOTOGRAPH_COLOUR = COLOURS[1]  # orange is that of the astronaut's suit
DRAWN = 450  # masks are drawn at this size and then reduced to SIDE, for thin smooth contours


def main(run: str, out: str) -> None:
    """Write gallery-KIND.jpg for each kind of expression, or the images of `photos`."""
    segmenter = Segmenter.from_pretrained(run, device="cpu", precision="float32")
    if run == "photos":
        paths = {path.name: path for path, _ in example_photographs()}
        for name, phrases in (
            ("photographs", {path.name: texts for path, texts in example_photographs()}),
            ("photographs-failures", FAILURES),
        ):
            shown = [photograph(segmenter, paths[file], text) for file, texts in phrases.items() for text in texts]
            (Path(out) / f"{name}.jpg").write_bytes(jpeg_bytes(np.concatenate(shown, axis=1), quality=85))
        return
    references = load_references(Path(run) / "scenes", "scenes").split("test")
    for kind in KINDS:
        strip = np.concatenate([panel(segmenter, *each) for each in first(references, kind)], axis=1)
        (Path(out) / f"gallery-{kind}.jpg").write_bytes(jpeg_bytes(strip, quality=85))


def first(references: tuple[Reference, ...], kind: str) -> list[tuple[Reference, Expression]]:
    """Return the first expression of a kind in each of the first scenes that have one."""
    found: dict[Path, tuple[Reference, Expression]] = {}
    for reference in references:
        for expression in reference.expressions:
            if expression.kind == kind:
                found.setdefault(reference.image_path, (reference, expression))
    return list(found.values())[:SCENES]


def panel(segmenter: Segmenter, reference: Reference, expression: Expression) -> NDArray[np.uint8]:
    """Draw true and predicted mask side by side, with the expression above and the IoU below."""
    image = read_image(reference.image_path)
    truth = union_mask(reference.targets(expression), reference.image_size).astype(bool)
    (prediction,) = segmenter.predict(image, expression.text)
    iou = (truth & prediction.mask).sum() / (truth | prediction.mask).sum()

    def drawn(mask: MaskArray, colour: tuple[int, int, int]) -> Image.Image:
        pixels = overlay(cell(image, DRAWN), mask_cell(mask, DRAWN), colour)
        return Image.fromarray(np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8))

    line = LETTERS + GAP
    canvas = Image.new("RGB", (2 * SIDE + 4 * GAP, SIDE + 2 * line + 2 * GAP), "white")
    canvas.paste(drawn(truth, TRUTH_COLOUR), (GAP, line + GAP))
    canvas.paste(drawn(prediction.mask, PREDICTION_COLOUR), (SIDE + 2 * GAP, line + GAP))
    write, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTERS)
    write.text((GAP, GAP / 2), expression.text, "black", font)
    write.text((SIDE + 2 * GAP, SIDE + line + GAP), f"IoU {100 * iou:.0f}", "black", font)
    return np.asarray(canvas)


def photograph(segmenter: Segmenter, path: Path, text: str) -> NDArray[np.uint8]:
    """Draw the predicted mask on a photograph, with the expression above and the verdict below."""
    image = read_image(path)
    (prediction,) = segmenter.predict(image, text)
    drawn = Image.fromarray(overlay(image, prediction.mask, PHOTOGRAPH_COLOUR))
    side, gap, letters = (SHARP * each for each in (SIDE, GAP, LETTERS))
    drawn.thumbnail((side + 4 * gap, side))
    line = letters + gap
    canvas = Image.new("RGB", (drawn.width + 2 * gap, side + 2 * line + 2 * gap), "white")
    canvas.paste(drawn, (gap, line + gap))
    write, font = ImageDraw.Draw(canvas), ImageFont.load_default(letters)
    write.text((gap, gap / 2), text, "black", font)
    write.text((gap, drawn.height + line + gap), prediction.verdict, "black", font)
    return np.asarray(canvas)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of dcris quickstart, or photos")
    parser.add_argument("out", help="folder of the images")
    try:
        main(**vars(parser.parse_args()))
    except DcrisError as error:
        parser.error(str(error))
