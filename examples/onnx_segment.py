"""Segment by phrase with ONNX Runtime: needs an export of dcris, but neither dcris nor torch.

dcris export runs/tiny --out onnx/tiny
python examples/onnx_segment.py onnx/tiny photo.jpg "left dog" "the red cup"  # photo.0.png ...
"""

import argparse
import html
import json
import re
import sys
import zlib
from io import BytesIO
from pathlib import Path

import ftfy
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(folder):
    """Load model.json and the three graphs."""
    graphs = (onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx") for name in ("fit", "text", "image"))
    settings = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    if file := settings["tokenizer"].get("file"):
        settings["tokenizer"]["file"] = str(Path(folder) / file)
    return settings, *graphs


QUOTED = r"""^(["'`])((?:(?!\1).|(?<=\w)\1(?=\w))+)\1$"""


def tokenize(phrases, length, strip, kind, start, end, words=(), bucket=0, buckets=0, file=""):
    """Return token ids [B, length] int64: start, ids of the phrase, end, zeros."""
    if kind == "clip":
        from instant_clip_tokenizer import Tokenizer

        encode = Tokenizer().encode
    elif kind == "bert":
        from tokenizers import Tokenizer

        pieces = Tokenizer.from_file(file)
        pieces.encode_special_tokens = True  # in a phrase, "[CLS]" is plain text
    rows = np.zeros((len(phrases), length), np.int64)
    for row, phrase in zip(rows, phrases, strict=True):
        text = ftfy.fix_text(phrase)  # this and the next three lines clean the phrase as CLIP's tokenizer does
        for _ in range(2):  # long numbers ("&#999...") are cut: int() refuses more than 4300 digits
            text = html.unescape(re.sub(r"(?<=&#)0*([0-9]{1,20})[0-9]*", r"\1", text))
        text = " ".join(text.split()).lower()
        for _ in range(2 * strip):  # without quotes around the phrase and a full stop at its end
            text = re.sub(QUOTED, r"\2", re.sub(r"(?<!\.)\.$", "", text).strip()).strip() or text
        if kind == "clip":
            ids = encode(text)
        elif kind == "bert":
            ids = pieces.encode(text, add_special_tokens=False).ids
        else:  # tiny towers: known words have ids, other words share the hash buckets
            ids = [words.get(w) or bucket + zlib.crc32(w.encode()) % buckets for w in re.findall(r"\w+|[^\w\s]", text)]
        row[: len(ids) + 2] = [start, *ids[: length - 2], end]
        if len(ids) > length - 2:
            print(f"{phrase!r} is longer than the model reads; its end is ignored", file=sys.stderr)
    return rows


def segment(model, images, phrases):
    """Return masks [phrases, H, W] bool of each image [H, W, 3] uint8, and the probabilities of
    presence [images, phrases], or None. The mask of what is probably not there is empty."""
    settings, fit, text, image = model
    squares, rows, columns = zip(*(fit.run(None, {"photograph": each}) for each in images), strict=True)
    tokens = tokenize(phrases, settings["word_length"], settings["strip_phrases"], **settings["tokenizer"])
    words = text.run(None, {"tokens": tokens})
    # One row per pair of an image and a phrase; image_index is the image of each row.
    inputs = {"images": np.stack(squares), "image_index": np.repeat(np.arange(len(images)), len(phrases))}
    inputs |= {n: np.concatenate([v] * len(images)) for n, v in zip(("f_t", "f_s", "padding"), words, strict=True)}
    logits, *present = image.run(None, inputs)  # presence: of models with a presence head
    maps = (1 / (1 + np.exp(-np.maximum(logits, -80)))).reshape(len(images), len(phrases), *logits.shape[2:])
    masks = [up @ each @ across > settings["threshold"] for up, each, across in zip(rows, maps, columns, strict=True)]
    if not present:
        return masks, None
    present = present[0].reshape(len(images), -1)
    return [each & (p[:, None, None] >= 0.5) for each, p in zip(masks, present, strict=True)], present


def read(file):
    """Read an image as dcris does: [H, W, 3] uint8 RGB, upright, on white, 16 bits scaled to 8."""
    # From memory: Pillow 12 maps some TIFF files that it opens by name, and rotates those wrongly.
    image = ImageOps.exif_transpose(Image.open(BytesIO(Path(file).read_bytes())))
    if image.mode.startswith("I"):  # convert() would clip values above 255
        grey = np.asarray(image)
        grey = grey >> 8 if image.mode.startswith("I;16") else grey * (255 / max(255, grey.max()))
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="written by dcris export")
    parser.add_argument("file", help="an image")
    parser.add_argument("phrases", nargs="+")
    folder, file, phrases = vars(parser.parse_args()).values()
    (masks,), present = segment(load(folder), [read(file)], phrases)
    for number, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"{Path(file).stem}.{number}.png")
        print(phrases[number], "" if present is None else f"is present with probability {present[0, number]:.2f}")
