"""Segment many images and phrases into a folder: its files, their order, and what a repeated call skips.

For image a.jpg and its phrase number k (from 0): a.k.mask.png (0 and 255), a.k.overlay.png, a.k.cutout.png (the object alone,
transparent around it; none where nothing was found), a.k.scores.npy (float16 probabilities). For a video clip.mp4 the same for
each frame, as clip.frames/000030.k.mask.png, but one clip.overlay.mp4 in place of overlays. For all: predictions.json, a list
of COCO results with phrase and file name beside them; label_studio.json and label_studio.xml.

A folder may be given several calls. What they have answered is in its journal, and predictions.json has all of it: a call adds
to it, under other names where another photograph has the name. Settings and phrases of what is there are not mixed with others.
"""

import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from dcris.checkpoints.backbones import fingerprint
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.errors import DcrisError
from dcris.inference.inputs import Task, is_utf8, named, quoted, source_exists
from dcris.inference.label_studio import label_studio_config, label_studio_task
from dcris.inference.prediction import Prediction, require_threshold
from dcris.inference.records import LOCK, Entry, Journal, Settings
from dcris.inference.segmenter import Segmenter
from dcris.inference.video import Frame, read_frames, write_overlay
from dcris.types import MaskArray
from dcris.utils.distributed import Processes
from dcris.utils.drawing import COLOURS, overlay, png_bytes
from dcris.utils.files import claim, make_directory, remove_partial, require_replaceable, write_file
from dcris.version import __version__

T = TypeVar("T")
Format = Literal["mask", "overlay", "coco", "scores", "cutout", "label-studio"]
ALL_FORMATS: tuple[Format, ...] = get_args(Format)
FORMATS: tuple[Format, ...] = ("mask", "overlay", "coco", "scores")
"""What is written where nothing else is asked for; of videos without scores, which are 4 MB a frame."""

_TOGETHER = {"coco": ("predictions.json",), "label-studio": ("label_studio.json", "label_studio.xml")}
"""The formats that put everything in one file."""

_ENDINGS = re.compile(r"(.*)\.\d+\.(?:(?:mask|overlay|cutout)\.png|scores\.npy)", re.DOTALL)

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
    """Tasks for a model, and the folder for the results.

    Images that the folder's journal lists are skipped, as long as they have not changed and their files exist. Answers about
    other images stay. Several processes share the work if each makes the same job; other jobs cannot write to the folder until
    `run` has ended.
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
            anew: do everything, also what is done; answers about these tasks that were made with other settings or for other
                phrases are replaced.
            image_url: what Label Studio finds the images under, before their names.
            group: the processes that share the work, and the folder.

        Raises DcrisError where the threshold is not between 0 and 1, where the folder cannot be written to or another process
        does so, and without `anew` where it holds answers of other settings, or about these images for other phrases.
        """
        self.segmenter, self.tasks, self.out, self.every = segmenter, list(tasks), out, every
        self.image_url, self.group = image_url, group or Processes()
        self.formats = set(FORMATS if formats is None else formats)
        self.video_formats = self.formats - {"scores"} if formats is None else self.formats
        self._fingerprint = fingerprint(segmenter.model.state_dict())
        self.threshold = segmenter.protocol.threshold if threshold is None else require_threshold(threshold)
        self._chosen: dict[str, int] = {}
        """How many frames of a video are asked about, once it was read."""
        self._journal = Journal(make_directory(out), self.group.rank)
        self.notes: list[str] = []
        """Lines about the folder, for the first process to print before the work begins."""
        self._dropped: set[str] = set()
        """Formats of answers that are in the folder no more."""
        self._places: dict[str, int] = {}
        self._settings = {video: self._settings_of(video) for video in (False, True)}
        self._stamps = {task.source: _stamp(task.path) for task in self.tasks}
        with ExitStack() as held:
            if self.group.first:
                held.enter_context(claim(out, LOCK))
            self.tasks, self._places = self.group.from_first(lambda: self._prepare(anew))
            self._held = held.pop_all()
        entries = self._journal.read().values()
        self._done = {entry.name: entry.frames for entry in entries if self._is_current(entry)}
        self.group.all_gather(None)  # nobody adds to a journal before all have read them
        images = [task for task in self.tasks if not task.video and task.name not in self._done]
        self.images = images[self.group.rank :: self.group.count]
        """This process's share of what is left to do."""
        self.videos = [task for task in self.tasks if task.video and not self._complete(task)]
        self.already = len(self.tasks) - len(images) - len(self.videos)
        """Images and videos that are done already."""

    def run(self) -> Iterator[Done | Failed | Written]:
        """Do what is left, and yield an event for each image and frame.

        An image that cannot be read is left out. At the end, and when the work is broken off, predictions.json and the like
        are written of all that is done, by the first process.

        Raises DcrisError at the end where something could not be read, and at once where a file cannot be written.
        """
        failed: list[Failed] = []
        with self._held:
            yield from self._run(failed)
        if failed and self.group.first:
            raise DcrisError(_summary(failed, len(self.tasks)))

    def _run(self, failed: list[Failed]) -> Iterator[Done | Failed | Written]:
        try:
            for event in chain(self._answer_images(), self._answer_videos()):
                if isinstance(event, Failed):
                    failed.append(event)
                yield event
            failed[:] = chain.from_iterable(self.group.all_gather(failed))
            if self.group.first:
                for drawn in self._finish_videos({event.task.name for event in failed}):
                    if isinstance(drawn, Failed):
                        failed.append(drawn)
                    yield drawn
        finally:  # also after a full disk or Ctrl-C: what is done is done
            self._journal.close()
            if self.group.first:
                self._write_together()

    # ---- what is done already

    def _settings_of(self, video: bool) -> Settings:
        return Settings(
            model=self._fingerprint,
            recipe=self.segmenter.config.recipe,
            precision=str(self.segmenter.dtype).removeprefix("torch."),
            threshold=self.threshold,
            formats=tuple(sorted(self.video_formats if video else self.formats)),
            every=self.every if video else None,
            version=__version__,
        )

    def _prepare(self, anew: bool) -> tuple[list[Task], dict[str, int]]:
        """Remove from the folder what is done again. Returns the tasks under their names there, and each source's place."""
        for file in chain.from_iterable(_TOGETHER[key] for key in self.formats & _TOGETHER.keys()):
            require_replaceable(self.out / file)  # they are written last
        before = list(self._moved(self._journal.read().values()))
        if damaged := self._journal.damaged:
            self.notes.append(f"{self._journal.path} has {damaged} damaged lines; their images are done again")
        if not anew:
            self._refuse_others(before)
        tasks = named(self.tasks, {entry.source: entry.task for entry in before})
        places = {entry.source: entry.place for entry in before}
        known = set(places.values())
        free = (place for place in count(1) if place not in known)
        for task in tasks:
            if task.source not in places:
                places[task.source] = next(free)
        by_source = {task.source: task for task in tasks}
        kept = []
        for entry in before:
            asked = by_source.get(entry.source)
            if asked is None or self._stamps[asked.source] is None:  # an image that is gone keeps its answers
                kept.append(entry)
            elif not anew and self._is_current(entry) and self._has_files(entry):
                kept.append(entry.model_copy(update=self._described(asked)))
            else:
                self._dropped |= {*entry.settings.formats}
        self._note_mixture(kept)
        self._remove_stale(tasks, kept)
        self._journal.gather(before, kept)
        return tasks, places

    def _moved(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries, those whose photograph was moved with its time of change under the source that it has now."""
        here = {(PurePath(task.source).name, *(self._stamps[task.source] or ())): task.source for task in self.tasks}
        for entry in entries:
            source = here.get((PurePath(entry.source).name, *entry.stamp), entry.source)
            moved = source != entry.source and not source_exists(entry.source)
            yield entry.model_copy(update={"source": source}) if moved else entry

    def _refuse_others(self, entries: Iterable[Entry]) -> None:
        """Raise DcrisError where the folder holds answers that this call's cannot stand beside."""
        phrases = {task.source: task.phrases for task in self.tasks}
        advice = "choose another --out, or add --anew to replace the answers about the images that this call names"
        for entry in entries:
            if differences := self._differences(entry):
                raise DcrisError(f"{self.out} holds answers made with {differences}; {advice}")
            now = phrases.get(entry.source, entry.phrases)
            if now != entry.phrases:
                asked, asks = (", ".join(map(repr, some)) for some in (entry.phrases, now))
                raise DcrisError(f"{self.out} holds answers about {entry.file_name} for {asked} (now {asks}); {advice}")

    def _differences(self, entry: Entry) -> str:
        """What differs between an entry's settings and this call's, in words."""
        now = self._settings[entry.video]
        if entry.source not in self._stamps:  # each video may have its own pace
            now = now.model_copy(update={"every": entry.settings.every})
        return entry.settings.differences(now)

    def _note_mixture(self, kept: Iterable[Entry]) -> None:
        """Add a note where answers of other settings stay, which only `anew` permits."""
        others = {entry.source: words for entry in kept if (words := self._differences(entry))}
        if others:
            self.notes.append(
                f"{self.out} keeps its answers about {len(others)} other images, made with {next(iter(others.values()))}"
            )

    def _is_current(self, entry: Entry) -> bool:
        """Whether an entry is about one of these tasks, as its file was when this began."""
        return self._stamps.get(entry.source) == list(entry.stamp)

    def _has_files(self, entry: Entry) -> bool:
        return all((self.out / file).is_file() for file in entry.files)

    def _remove_stale(self, tasks: Iterable[Task], kept: Iterable[Entry]) -> None:
        """Remove what a killed call has not finished, and files of the tasks that no entry names: new ones may be fewer."""
        names = {task.name for task in tasks}
        files = {file for entry in kept for file in entry.files}
        ended = {entry.task for entry in kept if entry.frames is not None}
        folders = {
            self.out,
            # By text: a photograph may be called "..png", and the parent of `out / "."` is that of `out`.
            *(self.out / name.rpartition("/")[0] for name in names),
            *(self.out / f"{name}.frames" for name in names),
        }
        for folder in folders:
            if not folder.is_dir():
                continue
            remove_partial(folder)
            for path in folder.iterdir():
                file = path.relative_to(self.out).as_posix()
                found = _ENDINGS.fullmatch(file)
                name = found[1] if found else file.removesuffix(".overlay.mp4")
                stale = file not in files if found else name != file and name not in ended
                ours = name in names or name.rpartition(".frames/")[0] in names
                if ours and stale and path.is_file() and not path.is_symlink():
                    path.unlink()

    def _described(self, task: Task) -> dict[str, Any]:
        """What an entry says of its task, and may change without the answer changing."""
        return {
            "file_name": quoted(task.shown),
            "percent_encoded": not is_utf8(task.shown),
            "address": self.image_url + quote(os.fsencode(PurePath(task.shown).as_posix())),
        }

    def _complete(self, task: Task) -> bool:
        frames = self._done.get(_end(task))
        if frames is None:
            return False
        overlaid = "overlay" not in self.video_formats or self._overlay_path(task).exists()
        return overlaid and frames == sum(name.startswith(f"{task.name}//") for name in self._done) - 1

    def _note(self, task: Task, name: str, **more: Any) -> None:
        entry = {
            "name": name,
            "task": task.name,
            "source": task.source,
            "stamp": self._stamps[task.source] or (0, 0),
            "place": self._places[task.source],
            "phrases": task.phrases,
            "settings": self._settings[task.video].model_dump(),
            **self._described(task),
            **more,
        }
        self._journal.add(Entry.model_validate_json(json.dumps(entry)))  # checked as it will be when it is read

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
        name = task.name if frame is None else _frame_stem(task.name, frame.index)
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
        for entry in self._journal.read().values():
            if entry.frame is not None and entry.task in frames and self._is_current(entry):
                frames[entry.task][entry.frame] = entry
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
        entries = [entry for entry in self._journal.read().values() if entry.results is not None]
        entries.sort(key=lambda entry: (entry.place, entry.frame or 0))
        by_format = {
            key: [entry for entry in entries if key in entry.settings.formats and (key == "coco" or not entry.video)]
            for key in _TOGETHER
        }
        if by_format["coco"] or "coco" in self._dropped:
            _write_list(self.out / "predictions.json", _coco(by_format["coco"]))
        images = by_format["label-studio"]
        if images or "label-studio" in self._dropped:
            _write_list(self.out / "label_studio.json", map(_label_studio, images))
            phrases = [phrase for entry in images for phrase in entry.phrases]
            write_file(self.out / "label_studio.xml", label_studio_config(phrases))


def _coco(entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    numbers = _image_ids(entries)
    frames = count(max(numbers.values(), default=0) + 1)
    for entry in entries:
        number = next(frames) if entry.video else numbers[entry.source]  # each frame is an image of its own
        more: dict[str, Any] = {"percent_encoded": True} if entry.percent_encoded else {}
        name = entry.task if entry.frame is None else _frame_stem(entry.task, entry.frame)
        where = {} if entry.frame is None else {"frame": entry.frame, "time": entry.time}
        for phrase, result in enumerate(entry.results or ()):
            yield {
                **result.model_dump(mode="json"),
                "image_id": number,
                "file_name": entry.file_name,
                **more,
                "name": name,
                "phrase_number": phrase,
                **where,
            }


def _label_studio(entry: Entry) -> dict[str, Any]:
    answers = (
        (result.phrase, result.score, mask) for result, mask in zip(entry.results or (), _masks(entry), strict=True)
    )
    settings = entry.settings
    return label_studio_task(entry.address, _size(entry), answers, f"dcris {settings.version} {settings.recipe}")


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


def _size(entry: Entry) -> tuple[int, int]:
    return entry.size or (0, 0)


def _masks(entry: Entry) -> list[MaskArray]:
    return [
        decode_mask(result.segmentation.model_dump(mode="json"), _size(entry)).astype(bool)
        for result in entry.results or ()
    ]


def _write_list(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """A JSON list with an entry a line, written as they come: together they may be larger than memory."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, entry in enumerate(entries):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(entry, allow_nan=False))
            file.write("\n]\n")

    write_file(path, fill)


def _image_ids(entries: Sequence[Entry]) -> dict[str, int]:
    """By source: COCO's own number of each image where all are COCO's, else its place: never one number for two images."""
    places = {entry.source: entry.place for entry in entries}
    numbers = {source: re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", PurePath(source).stem) for source in places}
    found = {source: int(number[1]) for source, number in numbers.items() if number}
    return found if len({*found.values()}) == len(places) else places


def _frame_stem(name: str, index: int) -> str:
    return f"{name}.frames/{index:06}"


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
