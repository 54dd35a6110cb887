"""The rules by which predicted masks of videos are scored, by name.

What is alike: J and F of a frame, and their means over frames (dcris.evaluation.video_metrics).
Rules differ in what is scored (an expression, or an object among the others of its video), in which
frames count, and in what a missing mask is worth.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from dcris.data.images import image_size
from dcris.data.submissions import SUBMISSIONS
from dcris.data.videos import UNKNOWN, LabelImages, VideoExpression, VideoSet
from dcris.errors import DcrisError
from dcris.evaluation.metrics import Floats, Score
from dcris.evaluation.video_masks import SubmittedMasks, open_submission
from dcris.evaluation.video_metrics import best_match, compare_labels, compare_masks, decay, recall
from dcris.utils.streams import note
from dcris.utils.workers import cores

_JF = Score("jf", "J&F")
_J, _F = Score("j", "J"), Score("f", "F")
_RECALLS = Score("j_recall", "J-Recall"), Score("f_recall", "F-Recall")
_DECAYS = Score("j_decay", "J-Decay"), Score("f_decay", "F-Decay")

_MOST_PROPOSALS = 20
"""Objects that DAVIS's unsupervised evaluation accepts in a video."""

_MOST_CONTOURS = 500_000_000
"""Most pixels of the contours of a frame, each of which is a byte: 60 objects in 4K."""


@dataclass(frozen=True, slots=True)
class VideoResult:
    """The scores of one expression, or in Ref-DAVIS17 of one object by one annotator."""

    video: str
    expression: str | None
    """Its identifier; None for an object that no expression describes."""
    phrase: str
    frames: int
    """Frames that count."""
    values: Mapping[str, float]
    """By key of a score, in 0..1; decays in -1..1."""
    annotator: int | None = None
    """In Ref-DAVIS17."""
    target: int | None = None
    """The label of the object, in Ref-DAVIS17."""
    label: int | None = None
    """The label of the predicted object that it is compared with, in Ref-DAVIS17."""


@dataclass(frozen=True)
class VideoProtocol(ABC):
    """How the authors of a data set score predicted masks."""

    name: str
    """On the command line and in result files."""
    dataset: str
    metrics: Sequence[Score] = (_JF, _J, _F)
    """Means over the results; greater is better."""
    decays: Sequence[Score] = ()
    """Further means; less is better."""

    layout: str = "VIDEO/EXPRESSION/FRAME.png"
    """Of the predicted masks, for error messages."""

    @abstractmethod
    def compare(
        self, folder: str, expressions: Sequence[VideoExpression], videos: VideoSet, frames: "Frames"
    ) -> Iterator[VideoResult]:
        """Score the masks of a folder.

        Raises:
            DcrisError: a predicted or a true mask cannot be used.
        """

    def counted(self, frames: int) -> range:
        """Return the numbers of the frames that count, of so many."""
        return range(frames)

    def left_out(self, folder: str, expressions: Sequence[VideoExpression], masks: SubmittedMasks) -> list[VideoResult]:
        """Return the results of a folder that need not be there; usually none."""
        return []

    def values(self, scores: Floats) -> dict[str, float]:
        """Return all scores of J and F by frame, [T, 2]."""
        j, f = scores.T
        found = {"j": float(j.mean()), "f": float(f.mean()), "jf": float(scores.mean())}
        if self.decays:
            found |= {"j_recall": recall(j), "f_recall": recall(f), "j_decay": decay(j), "f_decay": decay(f)}
        return found


@dataclass(frozen=True)
class Frames:
    """The frames of predicted masks, which are compared in several threads."""

    masks: SubmittedMasks
    threshold: float | None
    pool: ThreadPoolExecutor

    def each(self, compare: Callable[[int], Floats], numbers: Sequence[int]) -> Floats:
        """Return what `compare` returns for each number, stacked."""
        return np.stack([*self.pool.map(compare, numbers)])


@dataclass(frozen=True)
class ByExpression(VideoProtocol):
    """The rule of MeViS and Ref-YouTube-VOS: J and F are means over the frames of an expression,
    and then over the expressions.

    In MeViS, the expressions of a video without a folder have J and F 0; other missing masks end
    the authors' program, and are an error here. Source: tools/eval_mevis.py of MeViS. The program
    of Ref-YouTube-VOS's server was not published; MeViS's set and server have the same form.
    """

    zero_without_folder: bool = False

    def left_out(  # noqa: D102
        self, folder: str, expressions: Sequence[VideoExpression], masks: SubmittedMasks
    ) -> list[VideoResult]:
        (each,) = expressions
        if not self.zero_without_folder or masks.names(each.video):
            return []
        zero = self.values(np.zeros((len(each.frames), 2)))
        return [VideoResult(each.video, each.expression_id, each.text, len(each.frames), zero)]

    def compare(  # noqa: D102
        self, folder: str, expressions: Sequence[VideoExpression], videos: VideoSet, frames: Frames
    ) -> Iterator[VideoResult]:
        (each,) = expressions
        truths = videos.truths
        assert truths is not None
        size = truths.size(each) or image_size(videos.frame_path(each.video, each.frames[0]))
        there = frames.masks.names(folder)

        def scores(number: int) -> Floats:
            name, nothing = f"{each.frames[number]}.png", np.zeros(size, bool)
            truth = truths.mask(each, number, size)
            found = frames.masks.mask(f"{folder}/{name}", size, frames.threshold) if name in there else nothing
            return compare_masks(found, nothing if truth is None else truth)

        values = self.values(frames.each(scores, range(len(each.frames))))
        yield VideoResult(each.video, each.expression_id, each.text, len(each.frames), values)


@dataclass(frozen=True)
class ByObject(VideoProtocol):
    """The rules of DAVIS for Ref-DAVIS17: the objects of one annotator's expressions are one
    submission, in which each pixel has one label, and J and F are means over the frames of an
    object, and then over all objects and the four annotators.

    Objects are those of the first frame's true labels, also without an expression. Pixels of
    unknown truth are in no mask, or in the older rule background. A missing mask ends the authors'
    program, and is an error here. Source: davis2017/evaluation.py and davis.py of
    davis2017-evaluation; eval_davis.py and scripts/dist_test_davis.sh of ReferFormer.
    """

    metrics: Sequence[Score] = (_JF, _J, _F, *_RECALLS)
    decays: Sequence[Score] = _DECAYS
    layout: str = "anno_0/VIDEO/FRAME.png to anno_3/VIDEO/FRAME.png"
    matched: bool = False
    """Whether each true object is compared with the predicted one that suits all best, whatever its
    label; otherwise with that of its own label."""
    semi_supervised: bool = False
    """The older rule, for methods that are given the first frame's labels: the truth is that in
    Annotations instead of Annotations_unsupervised, the first and the last frame do not count, and
    pixels of unknown truth are background."""

    def counted(self, frames: int) -> range:  # noqa: D102
        return range(1, frames - 1) if self.semi_supervised else range(frames)

    def labels(self, videos: VideoSet) -> LabelImages:
        """Return the true labels.

        Raises:
            DcrisError: the older ones are not there.
        """
        assert isinstance(videos.truths, LabelImages)
        if not self.semi_supervised:
            return videos.truths
        newer = videos.truths.folder  # DAVIS/Annotations_unsupervised/480p
        older = newer.parents[1] / "Annotations" / newer.name
        if newer.parent.name != "Annotations_unsupervised" or not older.is_dir():
            raise DcrisError(
                f"the protocol {self.name} needs the labels in DAVIS/Annotations/480p, and there is no folder {older}; unpack "
                "DAVIS-2017-trainval-480p.zip there, or choose another --protocol"
            )
        return LabelImages(older)

    def compare(  # noqa: D102
        self, folder: str, expressions: Sequence[VideoExpression], videos: VideoSet, frames: Frames
    ) -> Iterator[VideoResult]:
        if frames.threshold is not None:
            raise DcrisError("masks of Ref-DAVIS17 are labels, which have no threshold; leave out --mask-threshold")
        first, truths = expressions[0], self.labels(videos)
        size = truths.size(first)
        in_first = truths.labels(first, 0, size)
        objects = int(np.where(in_first == UNKNOWN, 0, in_first).max())
        numbers = self.counted(len(first.frames))
        if not objects or not numbers:
            problem = f"{len(first.frames)} frames" if objects else "no object in its first frame"
            raise DcrisError(f"the video {first.video} has {problem}, so that the protocol {self.name} cannot score it")
        most = max(objects, _MOST_PROPOSALS) if self.matched else objects
        if (most + objects) * math.prod(size) > _MOST_CONTOURS:
            raise DcrisError(
                f"the video {first.video} has {objects} objects in frames of {size[1]} x {size[0]} pixels, whose contours do "
                "not fit into memory; leave it out, or make its frames and masks smaller"
            )
        there, used = frames.masks.names(folder), np.zeros(len(first.frames), int)

        def scores(number: int) -> Floats:
            name, truth = f"{first.frames[number]}.png", truths.labels(first, number, size)
            if name not in there:
                found = np.zeros(size, np.uint8)
            else:
                found = frames.masks.labels(f"{folder}/{name}", size, most)
            used[number] = found.max()
            known = found if self.semi_supervised else np.where(truth == UNKNOWN, 0, found)
            return compare_labels(known, truth, (most, objects))

        pairs = frames.each(scores, numbers)[:, : max(objects, int(used.max()))]
        labels = best_match(pairs.mean(axis=(0, 3))) if self.matched else np.arange(objects)
        by_target = {int(each.objects[0]): each for each in expressions}
        for target, label in enumerate(labels.tolist()):
            each = by_target.get(target + 1)
            yield VideoResult(
                first.video,
                each.expression_id if each else None,
                each.text if each else "",
                len(numbers),
                self.values(pairs[:, label, target]),
                first.annotator,
                target + 1,
                label + 1,
            )


VIDEO_PROTOCOLS: dict[str, VideoProtocol] = {
    each.name: each
    for each in (
        ByExpression("ref-youtube-vos", "ref_youtube_vos"),
        ByExpression("mevis", "mevis", zero_without_folder=True),
        ByObject("davis-unsupervised", "ref_davis17", matched=True),
        ByObject("davis-by-label", "ref_davis17"),
        ByObject("davis-semi-supervised", "ref_davis17", semi_supervised=True),
    )
}
"""By name. The first of a data set is its usual one: of Ref-DAVIS17, the one that published figures
use."""


def mask_folders(videos: VideoSet) -> dict[str, tuple[VideoExpression, ...]]:
    """Return the folders of a split's masks, and the expressions that each has masks of.

    Without Ref-YouTube-VOS's outermost folder, which methods' programs do not write.
    """
    form, found = SUBMISSIONS[videos.dataset], dict[str, list[VideoExpression]]()
    for each in videos.expressions:
        folder, _, _ = form.file(each, each.frames[0]).removeprefix("Annotations/").rpartition("/")
        found.setdefault(folder, []).append(each)
    return {folder: tuple(some) for folder, some in found.items()}


def get_video_protocol(dataset: str, name: str | None = None) -> VideoProtocol:
    """Return a protocol by name, or the usual one of a data set of videos.

    Raises:
        DcrisError: the data set has no such protocol.
    """
    known = {key: each for key, each in VIDEO_PROTOCOLS.items() if each.dataset == dataset}
    if name is not None and name not in known:
        raise DcrisError(f"the protocol {name!r} is not one of {dataset}; choose from {', '.join(known)}")
    return known[name] if name is not None else next(iter(known.values()))


def require_truth(videos: VideoSet) -> None:
    """Raise DcrisError if the true masks of a split are unknown."""
    if videos.truths is None:
        raise DcrisError(
            f"the truth of {videos.dataset} {videos.split} is not public or not in its folder, so masks cannot be scored; "
            "choose another --split"
        )


def score_videos(
    path: Path,
    videos: VideoSet,
    protocol: VideoProtocol,
    *,
    missing_is_empty: bool = False,
    mask_threshold: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[VideoResult]:
    """Score predicted masks of a split.

    Args:
        path: folder or zip file in the layout of the protocol. Other videos and frames in it are
            ignored.
        videos: the split.
        protocol: of its data set.
        missing_is_empty: score a missing mask as an empty one.
        mask_threshold: for masks of more than two values, as in `binary_mask`; not for labels.
        progress: called with the number of folders done so far, of `mask_folders`.

    Returns:
        The results in the order of the expressions, or in Ref-DAVIS17 of videos and annotators.

    Raises:
        DcrisError: the truth is not public, a mask is missing that is not scored as such by the
            protocol, or one cannot be read or has another size.
    """
    require_truth(videos)
    folders = mask_folders(videos)
    masks = open_submission(path, {folder.partition("/")[0] for folder in folders}, protocol.layout)
    zero = {folder: protocol.left_out(folder, expressions, masks) for folder, expressions in folders.items()}
    needed = {
        f"{folder}/{expressions[0].frames[number]}.png": folder
        for folder, expressions in folders.items()
        if not zero[folder]
        for number in protocol.counted(len(expressions[0].frames))
    }
    _require_masks(masks, needed, missing_is_empty)
    if left_out := {result.video: None for results in zero.values() for result in results}:
        note(
            f"{path} lacks {len(left_out):,} of {len(videos.videos):,} videos, the first of them {next(iter(left_out))}; the "
            f"protocol {protocol.name} scores them 0"
        )
    found: list[VideoResult] = []
    with ThreadPoolExecutor(cores()) as pool:
        frames = Frames(masks, mask_threshold, pool)
        for done, (folder, expressions) in enumerate(folders.items(), 1):
            found += zero[folder] or protocol.compare(folder, expressions, videos, frames)
            progress(done)
    if relabelled := sum(each.label != each.target for each in found):
        note(
            f"{relabelled:,} of {len(found):,} objects were matched with a prediction of another label; --protocol "
            "davis-by-label compares labels"
        )
    return found


def _require_masks(masks: SubmittedMasks, needed: Mapping[str, str], missing_is_empty: bool) -> None:
    """Raise DcrisError if masks are missing, and all are or `missing_is_empty` is false.

    `needed` has the folder of each name.
    """
    there = {folder: masks.names(folder) for folder in dict.fromkeys(needed.values())}
    missing = [name for name, folder in needed.items() if name.rpartition("/")[2] not in there[folder]]
    if missing and (len(missing) == len(needed) or not missing_is_empty):
        incomplete = len({needed[name] for name in missing})
        raise DcrisError(
            f"{masks.path} lacks {len(missing):,} of {len(needed):,} masks, in {incomplete:,} of {len(there):,} folders, the "
            f"first of them {masks.prefix}{missing[0]}; add them, or give --missing-is-empty"
        )


def checksum(videos: VideoSet) -> str:
    """Return a SHA-256 of a split's expressions, frames and objects; results of others do not
    compare. Masks are not covered: reading them takes minutes."""
    content = [astuple(each) for each in videos.expressions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
