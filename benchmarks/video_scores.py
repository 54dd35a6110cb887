"""How long `dcris score` takes for masks of a video, with the files that it reads.

    python benchmarks/video_scores.py --frames 60 --size 480 854 --objects 4

Objects are ellipses that cover about a third of the frame; predictions are a few pixels away.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dcris.data.submissions import SUBMISSIONS
from dcris.data.videos import LabelImages, VideoExpression, VideoSet
from dcris.evaluation.video_protocols import VIDEO_PROTOCOLS, score_videos


def draw(size: tuple[int, int], objects: int, number: int, shift: int) -> np.ndarray:
    """Return the labels [H, W] of a frame by its number."""
    height, width = size
    labels = np.zeros(size, np.uint8)
    for label in range(1, objects + 1):
        middle = round(width * (label - 0.5) / objects) + number % 20 + shift, height // 2 + shift
        axes = round(0.4 * width / objects), round(0.35 * height)
        cv2.ellipse(labels, middle, axes, number + 30 * label, 0, 360, label, -1)
    return labels


def write(path: Path, values: np.ndarray) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def main() -> None:
    """Write a video and its predictions, and print the time of each protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 854), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--objects", type=int, default=4)
    args = parser.parse_args()
    size, targets = tuple(args.size), range(1, args.objects + 1)
    frames = tuple(f"{number:05d}" for number in range(args.frames))
    expressions = tuple(VideoExpression("clip", str(n - 1), f"object {n}", frames, (str(n),), 0) for n in targets)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, frame in enumerate(frames):
            write(root / f"truth/clip/{frame}.png", draw(size, args.objects, number, 0))
            predicted = draw(size, args.objects, number, 4)
            for each in expressions:
                write(root / "masks" / SUBMISSIONS["ref_davis17"].file(each, frame), predicted)
                mask = np.uint8(255) * (predicted == int(each.objects[0]))
                write(root / "masks" / SUBMISSIONS["mevis"].file(each, frame), mask)
        for name in ("mevis", "davis-by-label", "davis-unsupervised"):
            protocol = VIDEO_PROTOCOLS[name]
            videos = VideoSet(protocol.dataset, "made", root, expressions, LabelImages(root / "truth"))
            begin = time.perf_counter(), time.process_time()
            results = score_videos(root / "masks", videos, protocol)
            took = time.perf_counter() - begin[0], time.process_time() - begin[1]
            score = 100 * np.mean([each.values["jf"] for each in results])
            print(f"{name}: {took[0]:.2f} s, {took[1]:.2f} s of CPU time, J&F {score:.2f}")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
