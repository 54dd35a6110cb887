"""What `dcris predict` leaves on disk: masks, overlays, scores, and one COCO result file for everything."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dcris.data.images import read_image
from dcris.drawing import COLOURS, overlay, png_bytes
from dcris.errors import DcrisError
from dcris.files import make_directory, write_file, write_json
from dcris.prediction import Prediction
from dcris.segmenter import Segmenter

Format = Literal["mask", "overlay", "coco", "scores"]
FORMATS: tuple[Format, ...] = get_args(Format)
_PIXELS_AT_ONCE = 100_000_000
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The images that files and folders (not their subfolders) name, in order. Raises DcrisError where a path has none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise DcrisError(f"the folder {path} has no images in it ({', '.join(sorted(_SUFFIXES))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DcrisError(f"there is no image {path}")
    return found


def _names(images: Sequence[Path]) -> Iterator[str]:
    """A name for each image's files: its stem, with a number where another image has the same."""
    taken: set[str] = set()
    for image in images:
        numbered = (f"{image.stem}~{number}" for number in count(2))
        name = next(name for name in chain([image.stem], numbered) if name not in taken)
        taken.add(name)
        yield name


def predict_to_files(
    segmenter: Segmenter,
    images: Sequence[Path],
    phrases: Sequence[str],
    out: Path,
    formats: Sequence[Format] = FORMATS,
    threshold: float | None = None,
) -> Iterator[tuple[Path, Prediction]]:
    """Ask every phrase of every image, write the answers into `out`, and yield them as they come.

    For image a.jpg and phrase number k (from 0): a.k.mask.png (0 and 255), a.k.overlay.png, a.k.scores.npy (float16
    probabilities), each of the photograph's size; and predictions.json, a list of COCO results with the phrase beside them,
    written at the end, and when the work is broken off with what was done until then.

    Raises DcrisError where an image cannot be read or a file not be written.
    """
    make_directory(out)
    results: list[dict[str, Any]] = []
    try:
        yield from _predict_each(segmenter, images, phrases, out, formats, threshold, results)
    finally:  # also after an unreadable image, a full disk or Ctrl-C: what is done is done
        if "coco" in formats and results:
            write_json(out / "predictions.json", results)


def _predict_each(
    segmenter: Segmenter,
    images: Sequence[Path],
    phrases: Sequence[str],
    out: Path,
    formats: Sequence[Format],
    threshold: float | None,
    results: list[dict[str, Any]],
) -> Iterator[tuple[Path, Prediction]]:
    for image, name, image_id in zip(images, _names(images), _image_ids(images), strict=True):
        pixels = read_image(image)
        # Each phrase's probabilities are as large as the photograph, so large ones are asked a few phrases at a time.
        group = max(1, _PIXELS_AT_ONCE // (pixels.shape[0] * pixels.shape[1]))
        for start in range(0, len(phrases), group):
            some = phrases[start : start + group]
            answers = segmenter.predict(pixels, some, threshold=threshold, scores="scores" in formats)
            for number, answer in enumerate(answers, start):
                stem = f"{name}.{number}"
                if "mask" in formats:
                    write_file(out / f"{stem}.mask.png", png_bytes(answer.mask))
                if "overlay" in formats:
                    picture = overlay(pixels, answer.mask, COLOURS[number % len(COLOURS)])
                    write_file(out / f"{stem}.overlay.png", png_bytes(picture))
                if answer.probabilities is not None:
                    write_file(out / f"{stem}.scores.npy", _npy(answer.probabilities.astype(np.float16)))
                results.append(_coco_result(image, image_id, number, answer))
                yield image, answer


def _image_ids(images: Sequence[Path]) -> list[int]:
    """COCO's own number for each image where all are COCO's, else 1, 2, 3 and so on: never one number for two images."""
    numbers = [re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", image.stem) for image in images]
    found = {int(number[1]): None for number in numbers if number}
    return list(found) if len(found) == len(images) else list(range(1, len(images) + 1))


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _coco_result(image: Path, image_id: int, number: int, answer: Prediction) -> dict[str, Any]:
    return {
        **answer.to_coco(image_id),
        "file_name": image.name,
        "phrase_number": number,
    }
