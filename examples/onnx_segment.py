"""Segment by phrase with ONNX Runtime, numpy and a tokenizer: no torch, and nothing of dcris but its export.

dcris export runs/tiny --out onnx/tiny
python examples/onnx_segment.py onnx/tiny photo.jpg "left slice" "the red cup"    # photo.0.png, photo.1.png: 0 and 255
"""

import html
import json
import re
import sys
import zlib
from io import BytesIO
from pathlib import Path

import ftfy  # mends broken encodings, as CLIP's tokenizer does
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(folder):
    """What model.json says, and the three graphs, to be asked as often as wanted."""
    graphs = (onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx") for name in ("fit", "text", "image"))
    return json.loads((Path(folder) / "model.json").read_text(encoding="utf-8")), *graphs


def tokenize(phrases, length, kind, start, end, words=(), bucket=0, buckets=0):
    """[B, length] int64: start, the phrase's ids, end, padding of 0."""
    if kind == "clip":
        from instant_clip_tokenizer import Tokenizer

        encode = Tokenizer().encode
    rows = np.zeros((len(phrases), length), np.int64)
    for row, phrase in zip(rows, phrases, strict=True):
        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(phrase))).split()).lower()
        if kind == "clip":
            ids = encode(text)
        else:  # the tiny towers' own words; any other falls into a bucket
            ids = [words.get(w) or bucket + zlib.crc32(w.encode()) % buckets for w in re.findall(r"\w+|[^\w\s]", text)]
        row[: len(ids) + 2] = [start, *ids[: length - 2], end]
    return rows


def segment(model, photographs, phrases):
    """For each photograph [H, W, 3] uint8 the masks [phrases, H, W] bool."""
    settings, fit, text, image = model
    images, rows, columns = zip(*(fit.run(None, {"photograph": each}) for each in photographs), strict=True)
    words = text.run(None, {"tokens": tokenize(phrases, settings["word_length"], **settings["tokenizer"])})
    # Every phrase is asked of every photograph: image_index says which.
    asked = {"images": np.stack(images), "image_index": np.repeat(np.arange(len(images)), len(phrases))}
    asked |= {n: np.concatenate([v] * len(images)) for n, v in zip(("f_t", "f_s", "padding"), words, strict=True)}
    (logits,) = image.run(None, asked)
    maps = (1 / (1 + np.exp(-logits))).reshape(len(images), len(phrases), *logits.shape[2:])
    return [up @ each @ across > settings["threshold"] for up, each, across in zip(rows, maps, columns, strict=True)]


def read(file):
    """A photograph as [H, W, 3] uint8 RGB by dcris's rules: upright, transparency on white, more than 8 bits scaled to 8."""
    # Not by its name: then Pillow 12 maps some TIFFs into memory, and turns those wrongly.
    picture = ImageOps.exif_transpose(Image.open(BytesIO(Path(file).read_bytes())))
    if picture.mode.startswith("I"):  # convert() would make all above 255 white
        grey = np.asarray(picture)
        grey = grey >> 8 if picture.mode.startswith("I;16") else grey * (255 / max(255, grey.max()))
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in picture.info or picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        picture = white
    return np.asarray(picture.convert("RGB"))


if __name__ == "__main__":
    _, folder, file, *phrases = sys.argv
    for number, mask in enumerate(segment(load(folder), [read(file)], phrases)[0]):
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"{Path(file).stem}.{number}.png")
