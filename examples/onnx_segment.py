"""Segment by phrase with ONNX Runtime, numpy, OpenCV, Pillow and a tokenizer: no torch, and nothing of dcris but its export.

dcris export runs/tiny --out onnx/tiny
python examples/onnx_segment.py onnx/tiny photo.jpg "left slice" "the red cup"    # photo.0.png, photo.1.png: 0 and 255
"""

import html
import json
import re
import sys
import zlib
from pathlib import Path

import cv2
import ftfy
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def tokenize(phrases, settings):
    """[B, L] int64: start, the phrase's ids, end, padding of 0."""
    rows, kind = np.zeros((len(phrases), settings["word_length"]), np.int64), settings["tokenizer"]
    if kind["kind"] == "clip":
        from instant_clip_tokenizer import Tokenizer

        start, end, encode = 49406, 49407, Tokenizer().encode
    else:
        ids = {word: number for number, word in enumerate(kind["words"], 1)}
        bucket, many = len(ids) + 1, kind["buckets"]
        start, end = bucket + many, bucket + many + 1

        def encode(text):
            return [
                ids.get(word) or bucket + zlib.crc32(word.encode()) % many for word in re.findall(r"\w+|[^\w\s]", text)
            ]

    for row, phrase in zip(rows, phrases, strict=True):
        text = html.unescape(html.unescape(ftfy.fix_text(phrase)))
        framed = [start, *encode(" ".join(text.split()).lower())[: len(row) - 2], end]
        row[: len(framed)] = framed
    return rows


def letterbox(height, width, side):
    """[2, 3]: takes a pixel of the photograph to the square that it is centred in."""
    scale = min(side / height, side / width)
    left, top = (side - width * scale) / 2, (side - height * scale) / 2
    square = [(left, top), (width * scale + left, top), (left, height * scale + top)]
    return cv2.getAffineTransform(np.float32([(0, 0), (width, 0), (0, height)]), np.float32(square))


def sample(positions, length, zero_around):
    """[n, length]: the matrix that samples a line of pixels bicubically (a = -0.75) at n positions."""
    matrix, first = np.zeros((len(positions), length)), np.floor(positions).astype(int) - 1
    for pixel in (first + tap for tap in range(4)):
        d = np.abs(positions - pixel)
        near, far = (1.25 * d - 2.25) * d**2 + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0)) * (
            ((pixel >= 0) & (pixel < length)) | (not zero_around)
        )
        np.add.at(matrix, (np.arange(len(positions)), pixel.clip(0, length - 1)), weight)
    return matrix


def segment(folder, photographs, phrases):
    """Masks [H, W] bool: for each photograph [H, W, 3] uint8 a list with one for each phrase."""
    settings = json.loads((Path(folder) / "model.json").read_text())
    side, mean, std = settings["image_size"], np.float32(settings["mean"]), np.float32(settings["std"])
    text, image = (onnxruntime.InferenceSession(Path(folder) / name) for name in ("text.onnx", "image.onnx"))
    ways = [letterbox(*photograph.shape[:2], side) for photograph in photographs]
    border = tuple(255.0 * mean.astype(float))
    squares = [
        cv2.warpAffine(photograph, way, (side, side), flags=cv2.INTER_CUBIC, borderValue=border)
        for photograph, way in zip(photographs, ways, strict=True)
    ]
    images = np.stack([((square / np.float32(255) - mean) / std).transpose(2, 0, 1) for square in squares])
    words = text.run(["f_t", "f_s", "padding"], {"tokens": tokenize(phrases, settings)})
    # Every phrase of every photograph: image_index says whose turn it is.
    each = {
        name: np.concatenate([value] * len(images))
        for name, value in zip(("f_t", "f_s", "padding"), words, strict=True)
    }
    index = np.repeat(np.arange(len(images)), len(phrases))
    (logits,) = image.run(["logits"], {"images": images, "image_index": index, **each})
    masks = []
    for number, (photograph, way) in enumerate(zip(photographs, ways, strict=True)):
        # From the grid of logits to the square, corners aligned, and from there to the photograph's own pixels.
        rows, columns = (
            sample(np.arange(size) * way[axis, axis] + way[axis, 2], side, True)
            @ sample(np.linspace(0, cells - 1, side), cells, False)
            for size, axis, cells in zip(photograph.shape, (1, 0), logits.shape[2:], strict=False)
        )
        maps = 1 / (1 + np.exp(-logits[number * len(phrases) : (number + 1) * len(phrases), 0].astype(float)))
        masks.append([rows @ one @ columns.T > settings["threshold"] for one in maps])
    return masks


if __name__ == "__main__":
    _, folder, file, *phrases = sys.argv
    photograph = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    for number, mask in enumerate(segment(folder, [photograph], phrases)[0]):
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"{Path(file).stem}.{number}.png")
