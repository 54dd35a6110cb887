"""Made-up data sets of the official ones' size and shape: as many references, expressions,
photographs, annotations and bytes.

The official files cannot be passed on with the project. What reading and checking them costs
depends on their numbers alone, and those are here. Everything follows from the seed.
"""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcris.data.coco import IMAGE_FOLDER
from dcris.data.masks import encode_mask
from dcris.data.registry import PARTITIONS

PHOTOGRAPHS = {
    ("refcoco", "unc"): 19_994,
    ("refcoco+", "unc"): 19_992,
    ("refcocog", "umd"): 25_799,
    ("refcocog", "google"): 25_799,
}
"""As the REFER release counts them."""

_OF_SPLIT = {"val": 1_500, "testA": 750, "testB": 750, "test": 2_600}
"""Photographs whose references are all in one split; those of refcocog are about as many. The rest
is for training."""

_ANNOTATIONS_PER_PHOTOGRAPH = 9.84
"""instances.json holds every object of its photographs: 196,771 of refcoco's."""

_SIZES = ((480, 640), (640, 480), (427, 640), (375, 500))
_WORDS = (
    "the",
    "a",
    "man",
    "woman",
    "left",
    "right",
    "on",
    "with",
    "red",
    "white",
    "far",
    "second",
    "from",
    "umbrella",
)


def write_official(root: Path, dataset: str, split_by: str, *, pictures: bool = False, seed: int = 0) -> Path:
    """Write refs(split_by).p and instances.json of one official data set's size below `root`, and
    return `root`.

    With `pictures`, its photographs too: ordinary JPEG files of few sizes under many names.
    """
    source = np.random.default_rng(seed)
    count = PHOTOGRAPHS[dataset, split_by]
    image_ids = np.sort(source.choice(581_929, count, replace=False) + 1)
    size_of = source.integers(len(_SIZES), size=count)
    owners = _owners(dataset, split_by, count, source)
    # Every object that is referred to is some photograph's, and there are more that nobody refers
    # to.
    of_photograph = np.bincount(np.concatenate(list(owners.values())), minlength=count)
    of_photograph += source.poisson(_ANNOTATIONS_PER_PHOTOGRAPH - of_photograph.mean(), count)
    first = np.concatenate(([0], np.cumsum(of_photograph)[:-1]))
    ann_ids = source.permutation(2_000_000)[: of_photograph.sum()] + 1

    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    _write_instances(folder / "instances.json", image_ids, size_of, of_photograph, ann_ids, source)
    _write_references(folder / f"refs({split_by}).p", (dataset, split_by), owners, image_ids, first, ann_ids, source)
    if pictures:
        _write_pictures(root / IMAGE_FOLDER, image_ids, size_of, source)
    return root


def _owners(dataset: str, split_by: str, count: int, source: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """For each split, the photograph of each of its references: splits share none, but for
    google's, which are by object."""
    sizes = PARTITIONS[dataset, split_by].splits
    if split_by == "google":
        every = np.resize(np.arange(count), sum(references for references, _ in sizes.values()))
        cuts = np.cumsum([references for references, _ in sizes.values()])[:-1]
        return dict(zip(sizes, np.split(source.permutation(every), cuts), strict=True))
    order, owners, start = source.permutation(count), {}, 0
    for split, (references, _) in reversed(sizes.items()):  # train comes last and takes what is left
        end = start + _OF_SPLIT[split] if split != "train" else count
        owners[split] = np.resize(order[start:end], references)
        start = end
    return {split: owners[split] for split in sizes}


def _write_instances(
    path: Path,
    image_ids: NDArray[np.int64],
    size_of: NDArray[np.int64],
    of_photograph: NDArray[np.int64],
    ann_ids: NDArray[np.int64],
    source: np.random.Generator,
) -> None:
    """As text: building 200,000 annotations and writing them out would take a minute, and two
    gigabytes."""
    outlines = [[_outline(size, source) for _ in range(500)] for size in _SIZES]
    crowds = [[_crowd(size, source, packed) for packed in (False, True) for _ in range(10)] for size in _SIZES]
    images, annotations, taken = [], [], 0
    for image_id, kind, objects in zip(image_ids.tolist(), size_of.tolist(), of_photograph.tolist(), strict=True):
        height, width = _SIZES[kind]
        images.append(
            f'{{"license": 1, "file_name": "{_name(image_id)}", "coco_url": "http://mscoco.org/images/{image_id}", '
            f'"height": {height}, "width": {width}, "date_captured": "2013-11-14 16:28:13", '
            f'"flickr_url": "http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg", "id": {image_id}}}'
        )
        for ann_id, choice in zip(
            ann_ids[taken : taken + objects].tolist(), source.integers(50_000, size=objects).tolist(), strict=True
        ):
            crowd = choice % 100 == 0
            segmentation = crowds[kind][choice // 100 % 20] if crowd else outlines[kind][choice % 500]
            annotations.append(
                f'{{"segmentation": {segmentation}, "area": {choice}.25950000000002, "iscrowd": {int(crowd)}, '
                f'"image_id": {image_id}, "bbox": [{choice % 399}.03, 160.65, 120.0, 35.47], '
                f'"category_id": {choice % 80 + 1}, "id": {ann_id}}}'
            )
        taken += objects
    categories = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in range(1, 81)]
    with path.open("w") as file:
        file.write('{"info": {"year": 2014}, "licenses": [], "images": [' + ", ".join(images))
        file.write('], "annotations": [' + ", ".join(annotations))
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _outline(size: tuple[int, int], source: np.random.Generator) -> str:
    """One to three polygons of 10 to 80 corners, as an annotator's clicks around an object give
    them."""
    height, width = size
    polygons = []
    for _ in range(source.choice(3, p=(0.88, 0.09, 0.03)) + 1):
        corners = int(np.clip(source.lognormal(3.1, 0.5), 10, 80))
        angles = np.sort(source.random(corners)) * 2 * np.pi
        radius = min(size) * source.uniform(0.05, 0.4) * source.uniform(0.7, 1, corners)
        across = source.uniform(0.3, 0.7) * width + radius * np.cos(angles)
        down = source.uniform(0.3, 0.7) * height + radius * np.sin(angles)
        points = np.stack([across.clip(0, width), down.clip(0, height)], axis=1).ravel()
        polygons.append("[" + ", ".join(f"{value:.2f}" for value in points.tolist()) + "]")
    return f"[{', '.join(polygons)}]"


def _crowd(size: tuple[int, int], source: np.random.Generator, packed: bool) -> str:
    """Run lengths, as they are given for crowds of people; `packed` as text."""
    height, width = size
    coarse = source.random((12, 16)) < 0.3
    coarse[6, 8] = True
    mask = np.kron(coarse, np.ones((54, 54)))[:height, :width]
    if packed:
        return json.dumps(encode_mask(mask))
    flat = mask.T.ravel()
    runs = np.diff(np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]))).tolist()
    return json.dumps({"size": [height, width], "counts": [0, *runs] if flat[0] else runs})


def _write_references(
    path: Path,
    key: tuple[str, str],
    owners: dict[str, NDArray[np.int64]],
    image_ids: NDArray[np.int64],
    first: NDArray[np.int64],
    ann_ids: NDArray[np.int64],
    source: np.random.Generator,
) -> None:
    records, used = [], np.zeros_like(first)
    phrases = [
        " ".join(_WORDS[word] for word in source.integers(len(_WORDS), size=length))
        for length in np.clip(source.poisson(2.6 if key[0] != "refcocog" else 7.4, 20_000) + 1, 1, 40)
    ]
    sent_id = 0
    for split, photographs in owners.items():
        references, expressions = PARTITIONS[key].splits[split]
        sentences_of = np.full(references, expressions // references)
        sentences_of[: expressions % references] += 1
        for photograph, count in zip(photographs.tolist(), source.permutation(sentences_of).tolist(), strict=True):
            image_id, ann_id = int(image_ids[photograph]), int(ann_ids[first[photograph] + used[photograph]])
            used[photograph] += 1
            sentences = []
            for number in range(sent_id, sent_id + count):
                text = phrases[number * 7919 % len(phrases)] + " "  # each its own string in the file, as released
                sentences.append({"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text.strip()})
            records.append(
                {
                    "sent_ids": list(range(sent_id, sent_id + count)),
                    "file_name": f"{_name(image_id).removesuffix('.jpg')}_{ann_id}.jpg",
                    "ann_id": ann_id,
                    "ref_id": len(records),
                    "image_id": image_id,
                    "split": split,
                    "sentences": sentences,
                    "category_id": 1,
                }
            )
            sent_id += count
    path.write_bytes(pickle.dumps(records, 2))


def _write_pictures(
    folder: Path, image_ids: NDArray[np.int64], size_of: NDArray[np.int64], source: np.random.Generator
) -> None:
    """A photograph's worth of bytes to decode for each name, but only one file of each size on the
    disk."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = []
    for height, width in _SIZES:
        picture = Image.fromarray(source.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        stream = io.BytesIO()
        picture.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        originals.append(folder / f"original {height}x{width}.jpg")
        originals[-1].write_bytes(stream.getvalue())
    for image_id, kind in zip(image_ids.tolist(), size_of.tolist(), strict=True):
        os.link(originals[kind], folder / _name(image_id))
    for original in originals:
        original.unlink()


def _name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"
