"""Miniature sets in the official layouts of Ref-YouTube-VOS, Ref-DAVIS17 and MeViS, made from the
documented keys, with the traps that the official files have.

Functions write below a root and return it. A rectangle moves to the right by a pixel each frame.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from referee import box, picture, runs

H, W = 24, 36
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0, 0, 0] * 252
"""Of all 256 values: Pillow cuts greater values than the palette has."""


def rectangle(target: int, number: int) -> np.ndarray:
    """Return the mask [H, W] bool of an object, 1 to 3, in the frame of a number from 0."""
    left = 2 + 10 * (target - 1) + number
    return box(left, 4 * target, left + 8, 4 * target + 6, (H, W))


def labels(targets: tuple[int, ...], number: int) -> np.ndarray:
    """Return the labels [H, W] uint8 of a frame in which later objects hide earlier ones."""
    made = np.zeros((H, W), np.uint8)
    for target in targets:
        made[rectangle(target, number)] = target
    return made


def write_labels(path: Path, values: np.ndarray) -> None:
    """Write an indexed PNG, as YouTube-VOS and DAVIS have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    image.putpalette(PALETTE)
    image.save(path)


def write_frames(folder: Path, frames: list[str], size: tuple[int, int] = (H, W)) -> None:
    for seed, frame in enumerate(frames):
        picture(folder / f"{frame}.jpg", *size, seed=seed)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def frame_names(count: int, step: int = 1) -> list[str]:
    return [f"{step * number:05d}" for number in range(count)]


# ---- Ref-YouTube-VOS -----------------------------------------------------------------------------

YOUTUBE_FRAMES = frame_names(3, 5)
"""Annotated frames of YouTube-VOS are 5 apart."""


def youtube_records() -> dict[str, dict[str, Any]]:
    """Return the videos of the file of expressions by split. Valid lists test's video; object 2 of
    the first video of train is in no frame but the first."""

    def video(*texts: str, targets: tuple[str, ...] = ()) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for number, text in enumerate(texts):
            records[str(number)] = {"exp": text} | ({"obj_id": targets[number]} if targets else {})
        return {"expressions": records, "frames": YOUTUBE_FRAMES}

    test = {"c0ffee": video("a cat on the left")}
    return {
        "train": {
            "003234408d": video("a penguin", "the other one", "a Penguin  moving", targets=("1", "2", "1")),
            "0043f083b5": video("a bus", targets=("1",)),
        },
        "valid": {"0062f687f1": video("a dog", "a person"), **test},
        "test": test,
    }


def write_youtube(root: Path, records: dict[str, Any] | None = None) -> Path:
    home = root / "ref-youtube-vos"
    for split, videos in (records or youtube_records()).items():
        write_json(home / f"meta_expressions/{split}/meta_expressions.json", {"videos": videos})
        for name in videos:
            if split == "valid" and name == "c0ffee":
                continue  # as in the official archive of valid
            write_frames(home / f"{split}/JPEGImages/{name}", YOUTUBE_FRAMES)
            for number, frame in enumerate(YOUTUBE_FRAMES if split == "train" else []):
                made = labels((1, 2) if name == "003234408d" and number == 0 else (1,), number)
                write_labels(home / f"train/Annotations/{name}/{frame}.png", made)
    return root


# ---- Ref-DAVIS17 ---------------------------------------------------------------------------------

DAVIS_FRAMES = frame_names(4)
DAVIS_VIDEOS = {"train": {"classic-car": 1, "dogs-scale": 2}, "valid": {"motorbike": 2}}
"""Number of objects of each video."""
_MISSPELT = {"classic-car": "clasic-car", "dogs-scale": "dog-scale", "motorbike": "motor-bike"}


def davis_text(video: str, target: int, annotator: int) -> str:
    """Return a text, of annotator 2 with a letter beyond ASCII."""
    return f"object {target} of {video} by {annotator}" + ("\u00e9" if annotator > 1 else "")


def write_davis(root: Path, spoil: dict[str, str] | None = None) -> Path:
    """Write Ref-DAVIS17 as its authors publish it. The texts name a video of DAVIS's test set, too,
    and misspell three; label 255 has no truth. `spoil` replaces files of texts by name."""
    home = root / "ref-davis"
    everything = {**DAVIS_VIDEOS["train"], **DAVIS_VIDEOS["valid"]}
    for annotator, name in enumerate(("annot1", "annot1_full_video", "annot2", "annot2_full_video")):
        lines = [
            f'{_MISSPELT[video]} {target} "{davis_text(video, target, annotator)}"'
            for video, count in everything.items()
            for target in reversed(range(1, count + 1))
        ]
        path = home / f"davis_text_annotations/Davis17_{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*lines, 'aerobatics 1 "a red plane"', ""])
        text = (spoil or {}).get(path.name, text)
        path.write_bytes(text.encode("utf-8" if annotator < 2 else "latin-1"))
    for split, file in (("train", "train"), ("valid", "val")):
        path = home / f"DAVIS/ImageSets/2017/{file}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(DAVIS_VIDEOS[split]) + "\n")
    for video, count in everything.items():
        write_frames(home / f"DAVIS/JPEGImages/480p/{video}", DAVIS_FRAMES)
        for number, frame in enumerate(DAVIS_FRAMES):
            made = labels(tuple(range(1, count + 1)), number)
            made[-2:] = 255
            write_labels(home / f"DAVIS/Annotations_unsupervised/480p/{video}/{frame}.png", made)
    return root


def convert_davis(root: Path) -> Path:
    """Turn what `write_davis` wrote into what ReferFormer's convert_davis_to_ytvos.py makes of
    it."""
    home = root / "ref-davis"
    for split, videos in DAVIS_VIDEOS.items():
        made = {}
        for video, count in videos.items():
            for source, target in (("JPEGImages", "JPEGImages"), ("Annotations_unsupervised", "Annotations")):
                (home / split / target).mkdir(parents=True, exist_ok=True)
                (home / f"DAVIS/{source}/480p/{video}").rename(home / split / target / video)
            texts = [(t, a) for t in range(1, count + 1) for a in range(4)]
            made[video] = {
                "expressions": {
                    str(n): {"exp": davis_text(video, t, a), "obj_id": str(t)} for n, (t, a) in enumerate(texts)
                },
                "frames": DAVIS_FRAMES,
            }
        write_json(home / f"meta_expressions/{split}/meta_expressions.json", {"videos": made})
    (home / "DAVIS/ImageSets/2017/train.txt").unlink()
    (home / "DAVIS/ImageSets/2017/val.txt").unlink()
    return root


# ---- MeViS ---------------------------------------------------------------------------------------

MEVIS_FRAMES = frame_names(3)


def mevis_records() -> dict[str, dict[str, Any]]:
    """Return the videos of the files of expressions by split. An expression of valid_u describes
    two objects, which overlap; identifiers of masks go on from video to video."""
    return {
        "valid_u": {
            "1234abcd": {
                "expressions": {
                    "0": {"exp": "Bird flying away", "obj_id": [1], "anno_id": [7]},
                    "1": {"exp": "Two birds moving", "obj_id": [1, 2], "anno_id": [7, 8]},
                },
                "frames": MEVIS_FRAMES,
            },
            "ffff0000": {
                "expressions": {"0": {"exp": "nothing in sight", "obj_id": [1], "anno_id": [9]}},
                "frames": MEVIS_FRAMES,
            },
        },
        "valid": {"0ab4afe7fb46": {"expressions": {"0": {"exp": "a cow turning"}}, "frames": MEVIS_FRAMES}},
    }


def mevis_masks() -> dict[str, list[Any]]:
    """Return mask_dict.json: object 8 is absent from frame 1, object 9 from all."""
    return {
        "7": [runs(rectangle(1, number)) for number in range(3)],
        "8": [runs(rectangle(2, number)) if number != 1 else None for number in range(3)],
        "9": [None, None, None],
    }


def write_mevis(root: Path, records: dict[str, Any] | None = None, masks: dict[str, Any] | None = None) -> Path:
    home = root / "mevis"
    for split, videos in (records or mevis_records()).items():
        write_json(home / split / "meta_expressions.json", {"videos": videos})
        for name in videos:
            write_frames(home / split / "JPEGImages" / name, MEVIS_FRAMES)
    write_json(home / "valid_u/mask_dict.json", masks or mevis_masks())
    return root


WRITERS = {"ref_youtube_vos": write_youtube, "ref_davis17": write_davis, "mevis": write_mevis}
