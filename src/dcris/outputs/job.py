"""Many images and phrases answered into a folder: what is written, in which order, and what is not done again.

For image a.jpg and its phrase number k (from 0): a.k.mask.png (0 and 255), a.k.overlay.png, a.k.cutout.png (the object alone,
transparent around it; none where nothing was found), a.k.scores.npy (float16 probabilities). For a video clip.mp4 the same for
each frame, as clip.frames/000030.k.mask.png, but one clip.overlay.mp4 in place of overlays. For all: predictions.json, a list
of COCO results with phrase and file name beside them; label_studio.json and label_studio.xml.
"""

import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.drawing import COLOURS, overlay, png_bytes
from dcris.encoders.weights import fingerprint
from dcris.engine.distributed import Processes
from dcris.errors import DcrisError
from dcris.files import make_directory, write_file
from dcris.outputs.journal import Entry, Journal
from dcris.outputs.label_studio import label_studio_config, label_studio_task
from dcris.outputs.tasks import Task
from dcris.outputs.video import Frame, read_frames, write_overlay
from dcris.prediction import Prediction, require_threshold
from dcris.segmenter import Segmenter
from dcris.types import MaskArray
from dcris.version import __version__

T = TypeVar("T")
Format = Literal["mask", "overlay", "coco", "scores", "cutout", "label-studio"]
ALL_FORMATS: tuple[Format, ...] = get_args(Format)
FORMATS: tuple[Format, ...] = ("mask", "overlay", "coco", "scores")
"""What is written where nothing else is asked for; of videos without scores, which are 4 MB a frame."""

LOCAL_FILES = "/data/local-files/?d="
"""Under which Label Studio serves the folder that its setting LOCAL_FILES_DOCUMENT_ROOT names."""

_PIXELS_AT_ONCE = 100_000_000
"""Of all answers that are held at a time: each phrase's is as large as its photograph."""


@dataclass(frozen=True, slots=True)
class Done:
    """An image or frame that was answered, all of its files on disk."""

    task: Task
    frame: int | None
    answers: list[Prediction]


@dataclass(frozen=True, slots=True)
class Failed:
    """An image or video that could not be read (to its end)."""

    task: Task
    reason: str


@dataclass(frozen=True, slots=True)
class Written:
    """A file that came to be when all else was done."""

    path: Path
    what: str


class Job:
    """Questions to a model, answered into a folder.

    What the folder holds already, by its journal, is not done again: of these tasks, with this model, version and settings,
    as long as the image has not changed and its files are there. Several processes share the work if each makes the same job.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        tasks: Sequence[Task],
        out: Path,
        *,
        formats: Sequence[Format] | None = None,
        threshold: float | None = None,
        every: int = 1,
        anew: bool = False,
        image_url: str = LOCAL_FILES,
        group: Processes | None = None,
    ) -> None:
        """Look up what is done already.

        Args:
            segmenter: answers.
            tasks: what is asked, from `find_tasks` or `read_pairs`.
            out: folder for the results.
            formats: what to write; FORMATS by default.
            threshold: a pixel is the object's if its probability is greater; 0.35 by default.
            every: of a video, the first of so many frames is asked about.
            anew: do everything, also what is done.
            image_url: what Label Studio finds the images under, before their names.
            group: the processes that share the work, and the folder.

        Raises DcrisError where the threshold is not between 0 and 1, or the folder cannot be written to.
        """
        self.segmenter, self.tasks, self.out, self.every = segmenter, list(tasks), out, every
        self.image_url, self.group = image_url, group or Processes()
        self.formats = set(FORMATS if formats is None else formats)
        self.video_formats = self.formats - {"scores"} if formats is None else self.formats
        self.threshold = segmenter.protocol.threshold if threshold is None else require_threshold(threshold)
        self._chosen: dict[str, int] = {}
        """How many frames of a video are asked about, once it was read."""
        self._by_name = {task.name: task for task in self.tasks}
        self._stamps = {task.name: _stamp(task.path) for task in self.tasks}
        make_directory(out)
        settings = {
            "model": fingerprint(segmenter.model.state_dict()),
            "precision": str(segmenter.dtype),
            "threshold": self.threshold,
            "formats": sorted(self.formats),
            "every": every,
            "version": __version__,
        }
        self._journal = Journal(out, settings, self.group.rank)
        if self.group.first:
            self._journal.gather(lambda entry: not anew and self._holds(entry))
        self.group.gather(None)
        self._done = {entry["name"]: entry.get("frames") for entry in self._journal.read()}
        self.group.gather(None)  # nobody adds to a journal before all have read them
        images = [task for task in self.tasks if not task.video and task.name not in self._done]
        self.images = images[self.group.rank :: self.group.count]
        """This process's share of what is left to do."""
        self.videos = [task for task in self.tasks if task.video and not self._complete(task)]
        self.already = len(self.tasks) - len(images) - len(self.videos)
        """Images and videos that are done already."""

    def run(self) -> Iterator[Done | Failed | Written]:
        """Do what is left, and say of each image and frame when it is done.

        An image that cannot be read is left out. At the end, and when the work is broken off, predictions.json and the like
        are written of all that is done, by the first process.

        Raises DcrisError at the end where something could not be read, and at once where a file cannot be written.
        """
        failed: list[Failed] = []
        try:
            for event in chain(self._answer_images(), self._answer_videos()):
                if isinstance(event, Failed):
                    failed.append(event)
                yield event
            failed = list(chain.from_iterable(self.group.gather(failed)))
            if self.group.first:
                for drawn in self._finish_videos({event.task.name for event in failed}):
                    if isinstance(drawn, Failed):
                        failed.append(drawn)
                    yield drawn
        finally:  # also after a full disk or Ctrl-C: what is done is done
            self._journal.close()
            if self.group.first:
                self._write_together()
        if failed and self.group.first:
            raise DcrisError(_summary(failed, len(self.tasks)))

    # ---- what is done already

    def _holds(self, entry: Entry) -> bool:
        """Whether a journal's entry is of one of these tasks as it is now, and its files are there."""
        task = self._by_name.get(entry.get("task", ""))
        return (
            task is not None
            and entry.get("source") == str(task.path.absolute())
            and entry.get("stamp") == self._stamps[task.name] is not None
            and entry.get("phrases") == list(task.phrases)
            and all((self.out / file).exists() for file in entry.get("files", ()))
        )

    def _complete(self, task: Task) -> bool:
        frames = self._done.get(_end(task))
        if frames is None:
            return False
        overlaid = "overlay" not in self.video_formats or self._overlay_path(task).exists()
        return overlaid and frames == sum(name.startswith(f"{task.name}//") for name in self._done) - 1

    def _note(self, task: Task, name: str, **more: Any) -> None:
        self._journal.add(
            {
                "name": name,
                "task": task.name,
                "source": str(task.path.absolute()),
                "stamp": self._stamps[task.name],
                "phrases": list(task.phrases),
                **more,
            }
        )

    # ---- the work

    def _answer_images(self) -> Iterator[Done | Failed]:
        together: list[tuple[Task, NDArray[np.uint8]]] = []
        weight = 0
        for task, pixels in _ahead(_read, self.images):
            if isinstance(pixels, str):
                yield Failed(task, pixels)
                continue
            own = pixels.shape[0] * pixels.shape[1] * len(task.phrases)
            if together and (len(together) >= _images_at_once(self.segmenter.device) or weight + own > _PIXELS_AT_ONCE):
                yield from self._answer(together)
                together, weight = [], 0
            together.append((task, pixels))
            weight += own
        yield from self._answer(together)

    def _answer(self, together: list[tuple[Task, NDArray[np.uint8]]]) -> Iterator[Done]:
        if len(together) > 1:
            pictures: list[Any] = [pixels for _, pixels in together]
            phrases = [task.phrases for task, _ in together]
            scores = "scores" in self.formats
            found = self.segmenter.predict(pictures, phrases, threshold=self.threshold, scores=scores)
            for (task, pixels), answers in zip(together, found, strict=True):
                yield self._keep(task, None, pixels, [answers], self.formats)
        for task, pixels in together if len(together) == 1 else ():
            yield self._keep(task, None, pixels, self._in_groups(task, pixels, self.formats), self.formats)

    def _in_groups(self, task: Task, pixels: NDArray[np.uint8], formats: set[Format]) -> Iterator[list[Prediction]]:
        """The answers to one image's phrases, some at a time where it is large."""
        encoded = self.segmenter.encode_image(pixels)
        group = max(1, _PIXELS_AT_ONCE // (pixels.shape[0] * pixels.shape[1]))
        for start in range(0, len(task.phrases), group):
            some = task.phrases[start : start + group]
            yield self.segmenter.segment(encoded, some, threshold=self.threshold, scores="scores" in formats)

    def _answer_videos(self) -> Iterator[Done | Failed]:
        for task in self.videos:
            chosen = 0

            def mine(index: int, task: Task = task) -> bool:
                nonlocal chosen
                chosen += 1
                shared = (index // self.every) % self.group.count == self.group.rank
                return shared and _frame_name(task, index) not in self._done

            for frame in _until_broken(read_frames(task.path, self.every, mine)):
                if isinstance(frame, str):
                    yield Failed(task, frame)
                    break
                answers = self._in_groups(task, frame.pixels, self.video_formats)
                yield self._keep(task, frame, frame.pixels, answers, self.video_formats - {"overlay"})
            self._chosen[task.name] = chosen

    def _keep(
        self,
        task: Task,
        frame: Frame | None,
        pixels: NDArray[np.uint8],
        groups: Iterable[list[Prediction]],
        formats: set[Format],
    ) -> Done:
        """Write one image's or frame's files, and then that they are there."""
        name = task.name if frame is None else f"{task.name}.frames/{frame.index:06}"
        answers: list[Prediction] = []
        files: list[str] = []
        for answer in chain.from_iterable(groups):
            for ending, content in _files(answer, pixels, len(answers), formats):
                files.append(f"{name}.{len(answers)}.{ending}")
                write_file(self.out / files[-1], content)
            answers.append(replace(answer, probabilities=None))
        results = [answer.to_coco() for answer in answers]
        where = {} if frame is None else {"frame": frame.index, "time": frame.time}
        entry = {"size": list(pixels.shape[:2]), "files": files, "results": results, **where}
        self._note(task, task.name if frame is None else _frame_name(task, frame.index), **entry)
        return Done(task, None if frame is None else frame.index, answers)

    def _finish_videos(self, failed: set[str]) -> Iterator[Written | Failed]:
        """Draw the videos whose frames are all answered, as far as they could be read. One that fails stops no other."""
        if not self.videos:
            return
        frames: dict[str, dict[int, Entry]] = {task.name: {} for task in self.videos}
        for entry in self._journal.read():
            if "frame" in entry and entry["task"] in frames:
                frames[entry["task"]][entry["frame"]] = entry
        for task in self.videos:
            entries = frames[task.name]
            if entries and "overlay" in self.video_formats:

                def masks(index: int, entries: dict[int, Entry] = entries) -> list[MaskArray] | None:
                    return _masks(entries[index]) if index in entries else None

                path = self._overlay_path(task)
                try:
                    codec = write_overlay(task.path, path, masks, max(entries), self.every)
                except DcrisError as error:
                    yield Failed(task, str(error))
                    continue
                yield Written(path, f"{len(entries)} frames, {codec}")
            if task.name not in failed:
                self._note(task, _end(task), frames=self._chosen[task.name])

    def _overlay_path(self, task: Task) -> Path:
        return self.out / f"{task.name}.overlay.mp4"

    # ---- one file for everything

    def _write_together(self) -> None:
        entries: dict[str, list[Entry]] = {}
        for entry in self._journal.read():
            if "results" in entry:
                entries.setdefault(entry["task"], []).append(entry)
        if not entries:
            return
        ordered = [
            (task, entry)
            for task in self.tasks
            for entry in sorted(entries.get(task.name, ()), key=lambda entry: entry.get("frame", 0))
        ]
        if "coco" in self.formats:
            _write_list(self.out / "predictions.json", self._coco(ordered))
        if "label-studio" in self.formats:
            images = [(task, entry) for task, entry in ordered if not task.video]
            _write_list(self.out / "label_studio.json", (self._label_studio(*each) for each in images))
            phrases = [phrase for task, _ in images for phrase in task.phrases]
            write_file(self.out / "label_studio.xml", label_studio_config(phrases))

    def _coco(self, ordered: Iterable[tuple[Task, Entry]]) -> Iterator[Entry]:
        numbers = dict(zip((task.name for task in self.tasks), _image_ids(self.tasks), strict=True))
        frames = len(self.tasks)
        for task, entry in ordered:
            number = numbers[task.name]
            where = {}
            if task.video:  # each frame is an image of its own
                frames += 1
                number, where = frames, {"frame": entry["frame"], "time": entry["time"]}
            for phrase, result in enumerate(entry["results"]):
                yield {**result, "image_id": number, "file_name": task.shown, "phrase_number": phrase, **where}

    def _label_studio(self, task: Task, entry: Entry) -> Entry:
        answers = (
            (result["phrase"], result["score"], mask)
            for result, mask in zip(entry["results"], _masks(entry), strict=True)
        )
        address = self.image_url + quote(Path(task.shown).as_posix())
        height, width = entry["size"]
        return label_studio_task(
            address, (height, width), answers, f"dcris {__version__} {self.segmenter.config.recipe}"
        )


def _files(
    answer: Prediction, pixels: NDArray[np.uint8], number: int, formats: set[Format]
) -> Iterator[tuple[str, bytes]]:
    """The files of one answer: their ending and content."""
    if "mask" in formats:
        yield "mask.png", png_bytes(answer.mask)
    if "overlay" in formats:
        yield "overlay.png", png_bytes(overlay(pixels, answer.mask, COLOURS[number % len(COLOURS)]))
    if "cutout" in formats and answer.box is not None:
        stream = io.BytesIO()
        answer.cutout(pixels).save(stream, "PNG")
        yield "cutout.png", stream.getvalue()
    if "scores" in formats and answer.probabilities is not None:
        stream = io.BytesIO()
        np.save(stream, answer.probabilities.astype(np.float16), allow_pickle=False)
        yield "scores.npy", stream.getvalue()


def _masks(entry: Entry) -> list[MaskArray]:
    height, width = entry["size"]
    return [decode_mask(result["segmentation"], (height, width)).astype(bool) for result in entry["results"]]


def _write_list(path: Path, entries: Iterable[Entry]) -> None:
    """A JSON list with an entry a line, written as they come: together they may be larger than memory."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, entry in enumerate(entries):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(entry, allow_nan=False))
            file.write("\n]\n")

    write_file(path, fill)


def _image_ids(tasks: Sequence[Task]) -> list[int]:
    """COCO's own number for each image where all are COCO's, else 1, 2, 3 and so on: never one number for two images."""
    numbers = [re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", task.path.stem) for task in tasks]
    found = {int(number[1]): None for number in numbers if number}
    return list(found) if len(found) == len(tasks) else list(range(1, len(tasks) + 1))


def _frame_name(task: Task, index: int) -> str:
    return f"{task.name}//{index}"  # no path has two slashes, so no other task is called so


def _end(task: Task) -> str:
    return f"{task.name}//end"


def _images_at_once(device: torch.device) -> int:
    """In one pass: a CPU gains nothing by it, and answers sooner one after the other."""
    return 1 if device.type == "cpu" else 16


def _stamp(path: Path) -> list[int] | None:
    """What changes with a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read(task: Task) -> NDArray[np.uint8] | str:
    """An image's pixels, or why there are none."""
    try:
        return read_image(task.path)
    except DcrisError as error:
        return str(error)


def _until_broken(frames: Iterator[Frame]) -> Iterator[Frame | str]:
    """The frames, and at last why there are no more, if that is not the end: errors of those who use them are not caught."""
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except DcrisError as error:
            yield str(error)
            return
        yield frame


def _ahead(function: Callable[[Task], T], tasks: Iterable[Task]) -> Iterator[tuple[Task, T]]:
    """`function` of each task, worked out in a thread while the one before is being used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Task, Future[T]]] = deque()
        for task in tasks:
            waiting.append((task, pool.submit(function, task)))
            if len(waiting) > 1:
                before, future = waiting.popleft()
                yield before, future.result()
        for before, future in waiting:
            yield before, future.result()


def _summary(failed: Sequence[Failed], count: int) -> str:
    if count == 1:
        return failed[0].reason
    reasons = "; ".join(event.reason for event in failed[:3])
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"{len(failed)} of {count} could not be read, all others are done: {reasons}{more}"
