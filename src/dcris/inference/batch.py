"""Predict masks for many images, videos and phrases, and write them to a folder.

Files for image a.jpg and "Blue square", its phrase number k (from 0):

    a.annotated.png                  the image with all masks and a legend
    a.k-blue-square.mask.png         mask (0 and 255)
    a.k-blue-square.overlay.png      the image with the mask drawn on it
    a.k-blue-square.cutout.png       the object on a transparent background; none for an empty mask
    a.k-blue-square.scores.npy       probabilities, float16 [H, W]

Video clip.mp4 has the same files per frame, as clip.frames/000030.k-blue-square.mask.png, but one
clip.overlay.mp4 with all masks in place of overlays. Files for the whole folder:

    predictions.json      list of COCO results with phrase and file name
    label_studio.json     tasks for Label Studio; label_studio.xml is the labelling interface
    predictions-yolo/     a data set with images; also predictions-coco/, predictions-labelme/

Several calls may write to one folder; predictions.json then has the results of all of them.
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dcris.checkpoints.checkpoint import model_files, read_config
from dcris.config import RunConfig
from dcris.data.images import image_size, read_image
from dcris.data.masks import decode_mask
from dcris.data.table import is_utf8, quoted
from dcris.errors import DcrisError
from dcris.evaluation.preparation import pairs_in_memory
from dcris.evaluation.protocols import Cris
from dcris.inference.data_sets import TOOLS, data_set_folder, is_written, require_unchanged, write_data_set
from dcris.inference.inputs import Task, frames_folder, result_stem
from dcris.inference.label_studio import label_studio_config, label_studio_task
from dcris.inference.prediction import Prediction, long_phrase_warning, require_minima, require_threshold
from dcris.inference.records import (
    Record,
    Records,
    ResultFolder,
    Settings,
    Stamp,
    State,
    checksum,
    finished_records,
    sorted_records,
    stamp_of,
)
from dcris.inference.segmenter import EncodedPhrases, Segmenter
from dcris.inference.video import Frame, frame_count, read_frames, write_overlay
from dcris.types import MaskArray
from dcris.utils.annotate import Annotation, annotate, colour_of
from dcris.utils.arguments import Precision, Refinement
from dcris.utils.device import choose_device, choose_precision, precision_of
from dcris.utils.distributed import Processes
from dcris.utils.drawing import overlay_png, png_bytes
from dcris.utils.files import require_replaceable, write_file
from dcris.utils.lanes import ahead, lane_count, lanes
from dcris.utils.overlap import Job, overlapped
from dcris.utils.streams import counted
from dcris.version import __version__

Pixels = NDArray[np.uint8]
"""An RGB image [H, W, 3]."""

Format = Literal[
    "mask", "annotated", "overlay", "coco", "scores", "cutout", "label-studio", "coco-dataset", "yolo", "labelme"
]
FORMATS: tuple[Format, ...] = ("mask", "annotated", "coco", "scores")
"""Default formats of images."""
VIDEO_FORMATS: tuple[Format, ...] = ("mask", "overlay", "coco")
"""Default formats of videos; without scores, which take about 4 MB per frame."""

LOCAL_FILES = "/data/local-files/?d="
"""URL prefix under which Label Studio serves the folder of its setting
LOCAL_FILES_DOCUMENT_ROOT."""

_ENDINGS: dict[Format, str] = {
    "mask": "mask.png",
    "overlay": "overlay.png",
    "cutout": "cutout.png",
    "scores": "scores.npy",
}
"""Formats with one file per phrase, and how its name ends."""

_ANNOTATED = "annotated.png"

IMAGE_FORMATS: tuple[Format, ...] = ("label-studio", "coco-dataset", "yolo", "labelme")
"""Formats that have the results of images only, not of videos."""

_FOLDER_FILES = {"coco": ("predictions.json",), "label-studio": ("label_studio.json", "label_studio.xml")}
"""Formats with files for the whole folder."""

_MAX_PIXELS = 100_000_000
"""Limit on the pixels of all masks in memory at one time: each mask is as large as its image."""


_MAX_OVERLAPPED = 12_000_000
"""Pixels of an image above which nothing is predicted while its files are written: the scores of
three masks would take a gigabyte of memory."""

_MAX_LANE_PIXELS = 48_000_000
"""Limit on the pixels of the masks of images that are predicted at a time."""

_MAX_LISTED = 5
"""Number of phrases that are named as too long."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What a batch prediction writes."""

    formats: Sequence[Format] | None = None
    """FORMATS by default, VIDEO_FORMATS for videos."""
    threshold: float | None = None
    """Pixels with a greater probability belong to the mask; the protocol's threshold (0.35) by
    default."""
    min_score: float | None = None
    """With a lower score, a mask is empty; the default is that of `Segmenter.predict`."""
    min_area: int = 0
    """With fewer pixels, a mask is empty."""
    refine: Refinement | None = None
    """How edges are refined, see `Segmenter.predict`; the model's own setting by default."""
    every: int = 1
    """Predict every N-th frame of a video, from the first."""
    overwrite: bool = False
    """Predict everything again; replace results for these images that have other settings."""
    image_url: str = LOCAL_FILES
    """Prefix of the image names for Label Studio."""


@dataclass(frozen=True, slots=True)
class Done:
    """An image or frame whose files are all on disk."""

    task: Task
    frame: int | None
    predictions: list[Prediction]
    """One per phrase, without probabilities."""
    record: Record


@dataclass(frozen=True, slots=True)
class Failed:
    """An image or video that could not be read (to its end)."""

    task: Task
    reason: str


@dataclass(frozen=True, slots=True)
class Written:
    """The overlay video of a finished video, or a data set."""

    path: Path
    description: str


def settings_of(model: str, config: RunConfig, precision: torch.dtype, options: BatchOptions) -> dict[bool, Settings]:
    """Return the settings for images (False) and videos (True).

    Args:
        model: fingerprint of the weights.
        config: of the model.
        precision: that the model computes in.
        options: of the call.

    Raises:
        DcrisError: the threshold is not between 0 and 1, or a minimum is out of range.
    """
    min_score, min_area = require_minima(options.min_score, options.min_area, config.model.head.presence)
    shared: dict[str, Any] = {
        "model": model,
        "recipe": config.recipe,
        "precision": precision_of(precision),
        "threshold": Cris().threshold if options.threshold is None else require_threshold(options.threshold),
        "min_score": min_score,
        "min_area": min_area,
        "refine": config.data.refine if options.refine is None else options.refine,
        "version": __version__,
    }
    formats, video_formats = options.formats or FORMATS, options.formats or VIDEO_FORMATS
    return {
        False: Settings(**shared, formats=tuple(sorted({*formats})), every=None),
        True: Settings(**shared, formats=tuple(sorted({*video_formats})), every=options.every),
    }


def finished_results(
    checkpoint: Path, tasks: Sequence[Task], out: Path, options: BatchOptions, device: str, precision: Precision | None
) -> list[Record] | None:
    """Return the records of all tasks if a call with this model and these options finished them in
    the output folder, else None.

    The model is not loaded: the folder knows the files of the last one. Nothing is changed.

    Args:
        checkpoint: from `find_checkpoint`.
        tasks: from `find_tasks` or `read_pairs`.
        out: output folder.
        options: of the call.
        device, precision: as `Segmenter.from_pretrained` takes them.

    Raises:
        DcrisError: as `BatchPredictor`, or there is no such device.
    """
    state = State.read(out)
    if options.overwrite or not state.checkpoint or state.checkpoint != _checkpoint_stamps(checkpoint):
        return None
    config = read_config(checkpoint)
    dtype = choose_precision(config.train.precision if precision is None else precision, choose_device(device))
    settings = settings_of(state.model, config, dtype, options)
    journal = Records(out)
    known = journal.read()
    records = finished_records(journal, known, tasks, settings, options.image_url)
    everything = sorted_records(known.values())
    if records is None or state.records != checksum(everything):
        return None
    formats = {key for task in tasks for key in settings[task.video].formats}
    files = chain.from_iterable(_FOLDER_FILES[key] for key in formats & _FOLDER_FILES.keys())
    sets_written = all(is_written(out, key, _of_images(everything, key)) for key in formats & TOOLS.keys())
    return records if sets_written and all((out / file).is_file() for file in files) else None


def _checkpoint_stamps(checkpoint: Path) -> dict[str, Stamp | None]:
    return {quoted(str(file.absolute())): stamp_of(file) for file in model_files(checkpoint)}


class BatchPredictor:
    """Predicts the tasks that are not finished in the output folder.

    Images with a record in the folder are skipped if neither they nor their phrases have changed,
    and their files exist. Results for other images stay. Several ranks share the work if each
    creates the same BatchPredictor. No other call can write to the folder until `run` has ended.

    Args:
        segmenter: the model.
        tasks: images and videos with their phrases, from `find_tasks` or `read_pairs`.
        out: output folder.
        options: what to write.
        group: the ranks that share the work and the folder.
        checkpoint: where the model was found, for `finished_results`.

    Raises:
        DcrisError: the threshold is not between 0 and 1, a minimum is out of range, the folder
            cannot be written, another process writes to it, a data set in it was changed, or
            (without `overwrite`) it holds results with other settings.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        tasks: Sequence[Task],
        out: Path,
        options: BatchOptions | None = None,
        group: Processes | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        options, group = options or BatchOptions(), group or Processes()
        self.segmenter, self.out, self.every, self.group = segmenter, out, options.every, group
        self.formats = set(FORMATS if options.formats is None else options.formats)
        self.video_formats = set(VIDEO_FORMATS if options.formats is None else options.formats)
        model = segmenter.fingerprint
        settings = settings_of(model, segmenter.config, segmenter.dtype, options)
        self._decision = {
            key: getattr(settings[False], key) for key in ("threshold", "min_score", "min_area", "refine")
        }
        if group.first:
            require_unchanged(out, self.formats)
            for file in chain.from_iterable(_FOLDER_FILES[key] for key in self.formats & _FOLDER_FILES.keys()):
                require_replaceable(out / file)  # they are written last, so check now
        self.folder = ResultFolder(
            out,
            tasks,
            settings,
            image_url=options.image_url,
            overwrite=options.overwrite,
            group=group,
        )
        self._known = {"checkpoint": _checkpoint_stamps(checkpoint) if checkpoint else {}, "model": model}
        """What the folder will know about the model."""
        self.notes = self.folder.notes
        if group.first and "label-studio" in self.formats:
            self.notes += _same_addresses(self.folder.addresses().values())
        images = [task for task in self.folder.tasks if not task.video and task.name not in self.folder.done]
        self.images = images[group.rank :: group.count]
        """This rank's share of the images that are left."""
        self._frames_done = Counter(
            name.partition("//")[0] for name, frames in self.folder.done.items() if frames is None
        )
        """Number of finished frames of each video."""
        self.videos = [
            task
            for task in self.folder.tasks
            if task.video and self.folder.done.get(_end_name(task)) != self._frames_done[task.name]
        ]
        """Videos that are left; the ranks share the frames of each."""
        self.already = len(self.folder.tasks) - len(images) - len(self.videos)
        """Number of images and videos that are skipped because they are finished."""
        left = chain(images, self.videos)
        self.notes += long_phrases(segmenter.unread(phrase for task in left for phrase in task.phrases))
        self._phrases: EncodedPhrases | None = None
        """Of the last image."""
        one_by_one = _images_per_pass(segmenter.device) == 1 and (len(self.images) > 1 or self.videos)
        self._lanes = lane_count(segmenter.device) if one_by_one else 1
        """Number of images or frames that are predicted at a time."""
        self._lane_pairs = pairs_in_memory(segmenter.config, segmenter.device)
        """Limit on the phrases of all lanes."""
        self._frames_read: dict[str, int] = {}
        """Number of selected frames of each video that this call has read."""

    def finished(self) -> list[Record]:
        """Return the records of this call's images and frames that are finished already."""
        return [record for record in self.folder.records() if record.name in self.folder.done and record.results]

    def remaining(self) -> int | None:
        """Return the number of images and frames that this rank has to predict, or None if a video
        does not state its length."""
        frames = 0
        for task in self.videos:
            length = frame_count(task.path)
            if length is None:
                return None
            frames += max(0, math.ceil(length / self.every) - self._frames_done[task.name])
        return len(self.images) + math.ceil(frames / self.group.count)

    def run(self) -> Iterator[Done | Failed | Written]:
        """Predict what is left, and yield an event for each image and frame.

        An image that cannot be read is skipped. At the end, also after an error or Ctrl-C, the
        first rank writes predictions.json and the files for Label Studio with everything that is
        finished.

        Raises:
            DcrisError: at the end if something could not be read; at once if a file cannot be
                written.
        """
        failed: list[Failed] = []
        try:
            try:
                # Closed at once after Ctrl-C, not when the traceback is freed: lanes compute ahead.
                with closing(self._jobs()) as jobs:
                    for event in overlapped(jobs):
                        if isinstance(event, Failed):
                            failed.append(event)
                        yield event
                failed[:] = chain.from_iterable(self.group.all_gather(failed))
                if self.group.first:
                    for outcome in self._finish_videos({event.task.name for event in failed}):
                        if isinstance(outcome, Failed):
                            failed.append(outcome)
                        yield outcome
                    yield from self._write_data_sets()
            finally:
                if self.group.first:
                    self._write_folder_files()
        finally:
            self.folder.close()
        if failed and self.group.first:
            reasons = [each.reason for each in failed]
            raise DcrisError(failures(reasons, len(self.folder.tasks), "could not be read"))

    def _jobs(self) -> Generator["_Job", None, None]:
        yield from self._image_jobs()
        yield from self._video_jobs()

    # ---- images

    def _image_jobs(self) -> Iterator["_Job"]:
        group: list[tuple[Task, Pixels]] = []
        total = 0
        with lanes(self._lanes) as pool:
            for task, (read, found) in ahead(pool, self._lanes, self._read_and_predict, self.images):
                pixels = _read_task(task) if read is None else read
                if isinstance(pixels, str):
                    yield _failed(task, pixels)
                    continue
                if found is not None:
                    yield self._job(task, None, pixels, self.formats, _drained(found))
                    continue
                size = pixels.shape[0] * pixels.shape[1] * len(task.phrases)
                if group and total + size > _MAX_PIXELS:
                    yield from self._group_jobs(group)
                    group, total = [], 0
                group.append((task, pixels))
                total += size
                if len(group) >= _images_per_pass(self.segmenter.device):
                    yield from self._group_jobs(group)
                    group, total = [], 0
            yield from self._group_jobs(group)

    def _read_and_predict(self, task: Task) -> tuple[Pixels | str | None, list[Prediction] | None]:
        """Return the pixels of an image, or why it cannot be read; and its predictions, if they are
        made in a lane.

        With several lanes, an image that would fill their memory is not even read: its pixels are
        None.
        """
        if self._lanes > 1:
            try:
                if not self._fits_in_lane(task, image_size(task.path)):
                    return None, None
            except DcrisError as error:
                return str(error), None
        pixels = _read_task(task)
        if isinstance(pixels, str):
            return pixels, None
        return pixels, [*self._predict_phrases(task, pixels, self.formats)] if self._lanes > 1 else None

    def _fits_in_lane(self, task: Task, size: tuple[int, ...]) -> bool:
        """Return whether images of this size [H, W] can be predicted in all lanes at a time."""
        phrases = len(task.phrases) * self._lanes
        return phrases <= self._lane_pairs and size[0] * size[1] * phrases <= _MAX_LANE_PIXELS

    def _group_jobs(self, group: list[tuple[Task, Pixels]]) -> Iterator["_Job"]:
        """Predict several images in one pass, or the phrases of one image in as few as possible."""
        if len(group) == 1:
            ((task, pixels),) = group
            yield self._job(task, None, pixels, self.formats, self._predict_phrases(task, pixels, self.formats))
        elif group:
            images: list[Any] = [pixels for _, pixels in group]
            phrases = [task.phrases for task, _ in group]
            scores = "scores" in self.formats
            found = self.segmenter.predict(images, phrases, scores=scores, **self._decision)
            for (task, pixels), predictions in zip(group, found, strict=True):
                yield self._job(task, None, pixels, self.formats, predictions)

    def _predict_phrases(self, task: Task, pixels: Pixels, formats: set[Format]) -> Iterator[Prediction]:
        """Predict the phrases of one image, several per pass if their masks fit into memory."""
        encoded = self.segmenter.encode_image(pixels)
        at_once = max(1, _MAX_PIXELS // (pixels.shape[0] * pixels.shape[1]))
        for start in range(0, len(task.phrases), at_once):
            phrases = tuple(task.phrases[start : start + at_once])
            known = self._phrases  # another lane may replace it
            if known is None or known.phrases != phrases:  # mostly the same for all images of a folder
                known = self._phrases = self.segmenter.encode_phrases(phrases)
            found = self.segmenter.segment(encoded, known, scores="scores" in formats, **self._decision)
            yield from _drained(found)

    def _job(
        self, task: Task, frame: Frame | None, pixels: Pixels, formats: set[Format], predictions: Iterable[Prediction]
    ) -> "_Job":
        """Return what writes the files of one image or frame, while the next ones are predicted."""
        write = partial(self._write, task, frame, pixels, formats)
        return Job(predictions, write, alone=pixels.shape[0] * pixels.shape[1] > _MAX_OVERLAPPED)

    def _write(
        self,
        task: Task,
        frame: Frame | None,
        pixels: Pixels,
        formats: set[Format],
        predictions: Iterable[Prediction],
    ) -> Done:
        """Write the files of one image or frame, then its record."""
        index = None if frame is None else frame.index
        stem, name = _stem(task.name, index), task.name if index is None else _frame_name(task, index)
        stems = [result_stem(stem, k, phrase) for k, phrase in enumerate(task.phrases)]
        endings = [_ENDINGS[key] for key in formats & _ENDINGS.keys()]
        planned = [f"{each}.{ending}" for each in stems for ending in endings]
        self.folder.begin(name, [*planned, f"{stem}.{_ANNOTATED}"] if "annotated" in formats else planned)
        written: list[Prediction] = []
        files: list[str] = []
        for prediction in predictions:
            k = len(written)  # not enumerate, which would keep the probabilities
            written.append(replace(prediction, probabilities=None))
            if "scores" in formats and prediction.probabilities is not None:
                files.append(f"{stems[k]}.{_ENDINGS['scores']}")
                write_file(self.out / files[-1], partial(_save_scores, prediction.probabilities))
            del prediction  # its probabilities take 4 bytes a pixel, the files below as much
            for ending, content in _encode_files(written[k], pixels, k, formats):
                files.append(f"{stems[k]}.{ending}")
                write_file(self.out / files[-1], content)
        if "annotated" in formats:
            files.append(f"{stem}.{_ANNOTATED}")
            shown = [Annotation(each.phrase, each.verdict, each.mask) for each in written]
            write_file(self.out / files[-1], png_bytes(annotate(pixels, shown)))
        results = [prediction.to_coco() for prediction in written]
        where = {} if frame is None else {"frame": frame.index, "time": frame.time}
        record = self.folder.add(task, name, size=list(pixels.shape[:2]), files=files, results=results, **where)
        return Done(task, index, written, record)

    # ---- videos

    def _video_jobs(self) -> Iterator["_Job"]:
        for task in self.videos:
            selected = 0

            def is_mine(index: int, task: Task = task) -> bool:
                nonlocal selected
                selected += 1
                mine = (index // self.every) % self.group.count == self.group.rank
                return mine and _frame_name(task, index) not in self.folder.done

            def predict(frame: Frame | str, task: Task = task) -> list[Prediction] | None:
                if isinstance(frame, str) or self._lanes == 1 or not self._fits_in_lane(task, frame.pixels.shape):
                    return None
                return [*self._predict_phrases(task, frame.pixels, self.video_formats)]

            frames = _until_error(read_frames(task.path, self.every, is_mine))
            with lanes(self._lanes) as pool:
                for frame, found in ahead(pool, self._lanes, predict, frames):
                    if isinstance(frame, str):
                        yield _failed(task, frame)
                        break
                    predictions = (
                        self._predict_phrases(task, frame.pixels, self.video_formats)
                        if found is None
                        else _drained(found)
                    )
                    yield self._job(task, frame, frame.pixels, self.video_formats - {"overlay"}, predictions)
            self._frames_read[task.name] = selected

    def _finish_videos(self, failed: set[str]) -> Iterator[Written | Failed]:
        """Write the overlay videos and the end records.

        A video that fails does not stop the others.

        Args:
            failed: names of the videos that could not be read to their end. They get an overlay,
                but no end record.
        """
        if not self.videos:
            return
        frames: dict[str, dict[int, Record]] = {task.name: {} for task in self.videos}
        for record in self.folder.records():
            if record.frame is not None and record.task in frames and self.folder.is_current(record):
                frames[record.task][record.frame] = record
        for task in self.videos:
            records, files = frames[task.name], []
            if records and "overlay" in self.video_formats:

                def masks_of(index: int, records: dict[int, Record] = records) -> list[MaskArray] | None:
                    return _masks(records[index]) if index in records else None

                files = [f"{task.name}.overlay.mp4"]
                path = self.out / files[0]
                self.folder.begin(_end_name(task), files)
                try:
                    codec = write_overlay(task.path, path, masks_of, max(records), self.every)
                except DcrisError as error:
                    yield Failed(task, str(error))
                    continue
                yield Written(path, f"{counted(len(records), 'frame')}, {codec}")
            if task.name not in failed:
                self.folder.add(task, _end_name(task), files=files, frames=self._frames_read[task.name])

    # ---- files for the whole folder

    def _write_folder_files(self) -> None:
        everything = self.folder.records()
        records = [record for record in everything if record.results is not None]
        dropped = self.folder.dropped_formats
        coco = [record for record in records if "coco" in record.settings.formats]
        if coco or "coco" in dropped:
            _write_list(self.out / "predictions.json", _coco_results(coco))
        images = _of_images(records, "label-studio")
        if images or "label-studio" in dropped:
            _write_list(self.out / "label_studio.json", map(_label_studio_task, images))
            phrases = [phrase for record in images for phrase in record.phrases]
            write_file(self.out / "label_studio.xml", label_studio_config(phrases))
        if everything:
            known = self._known | {"records": checksum(everything)}
            State.read(self.out).model_copy(update=known).write(self.out)

    def _write_data_sets(self) -> Iterator[Written]:
        records = self.folder.records()
        for key in TOOLS:
            images = _of_images(records, key)
            if (images or key in self.folder.dropped_formats) and not is_written(self.out, key, images):
                yield Written(data_set_folder(self.out, key), write_data_set(self.out, key, images))


_Job = Job[Prediction, Done | Failed]


def _failed(task: Task, reason: str) -> _Job:
    return Job((), lambda nothing: Failed(task, reason))


def result_objects(out: Path, given: Path, record: Record) -> Iterator[dict[str, Any]]:
    """Yield the results of an image or frame as `dcris predict --json` prints them.

    They have the fields of predictions.json except the numbers of images, the image as it was
    `given`, and the paths of the result's files.
    """
    name, image = _stem(record.task, record.frame), str(given)
    where = {} if record.frame is None else {"frame": record.frame, "time": record.time}
    for number, result in enumerate(record.results or ()):
        stem = result_stem(name, number, result.phrase)
        files = [file for file in record.files if file.startswith(f"{stem}.") or file == f"{name}.{_ANNOTATED}"]
        yield {
            "image": quoted(image),
            **({} if is_utf8(image) else {"percent_encoded": True}),
            **where,
            **result.model_dump(mode="json", exclude_none=True, exclude={"image_id", "category_id"}),
            "phrase_number": number,
            "files": [quoted(str(out / file)) for file in files],
        }


def _of_images(records: Iterable[Record], format: str) -> list[Record]:
    """Return the records of images that have a format."""
    return [each for each in records if each.results is not None and not each.video and format in each.settings.formats]


def _encode_files(
    prediction: Prediction, pixels: Pixels, number: int, formats: set[Format]
) -> Iterator[tuple[str, bytes]]:
    """Yield the ending and the content of each file of one prediction but its scores."""
    if "mask" in formats:
        yield _ENDINGS["mask"], png_bytes(prediction.mask)
    if "overlay" in formats:
        yield _ENDINGS["overlay"], overlay_png(pixels, prediction.mask, colour_of(number))
    if "cutout" in formats and prediction.box is not None:
        stream = io.BytesIO()
        prediction.cutout(pixels).save(stream, "PNG")
        yield _ENDINGS["cutout"], stream.getvalue()


def _save_scores(probabilities: NDArray[np.float32], path: Path) -> None:
    """Write probabilities [H, W] as `np.save` does, in float16 and without a copy of them."""
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": probabilities.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in probabilities:
            file.write(row.astype("<f2").tobytes())


def _coco_results(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    image_ids = _image_ids(records)
    frame_ids = count(max(image_ids.values(), default=0) + 1)
    for record in records:
        image_id = next(frame_ids) if record.video else image_ids[record.source]  # each frame is an image of its own
        fields: dict[str, Any] = {"percent_encoded": True} if record.percent_encoded else {}
        name = _stem(record.task, record.frame)
        where = {} if record.frame is None else {"frame": record.frame, "time": record.time}
        for phrase_number, result in enumerate(record.results or ()):
            yield {
                **result.model_dump(mode="json", exclude_none=True),
                "image_id": image_id,
                "file_name": record.file_name,
                **fields,
                "name": name,
                "stem": result_stem(name, phrase_number, result.phrase),
                "phrase_number": phrase_number,
                **where,
            }


def _image_ids(records: Sequence[Record]) -> dict[str, int]:
    """Image ids by source: COCO's if every image has a COCO file name, else the folder's numbers.

    The two kinds are never mixed, so that no two images share an id.
    """
    places = {record.source: record.place for record in records}
    numbers = {source: re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", PurePath(source).stem) for source in places}
    found = {source: int(number[1]) for source, number in numbers.items() if number}
    return found if len({*found.values()}) == len(places) else places


def _label_studio_task(record: Record) -> dict[str, Any]:
    results = (
        (result.phrase, result.score, mask) for result, mask in zip(record.results or (), _masks(record), strict=True)
    )
    model = f"dcris {record.settings.version} {record.settings.recipe}"
    return label_studio_task(record.address, results, model)


def _masks(record: Record) -> list[MaskArray]:
    return [
        decode_mask(result.segmentation.model_dump(mode="json"), record.size or (0, 0)).astype(bool)
        for result in record.results or ()
    ]


def _write_list(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list with one entry per line, without holding all entries in memory."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, entry in enumerate(entries):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(entry, allow_nan=False))
            file.write("\n]\n")

    write_file(path, fill)


def _stem(name: str, frame: int | None) -> str:
    """Start of the names of the files of an image or frame; `name` is that of its task."""
    return name if frame is None else f"{frames_folder(name)}/{frame:06}"


def _frame_name(task: Task, index: int) -> str:
    """The record name of a frame. No path has two slashes, so no task has that name."""
    return f"{task.name}//{index}"


def _end_name(task: Task) -> str:
    """The record name of a video's end."""
    return f"{task.name}//end"


def _images_per_pass(device: torch.device) -> int:
    """A CPU is no faster with several images per pass, and shows its first result later."""
    return 1 if device.type == "cpu" else 16


def _read_task(task: Task) -> Pixels | str:
    """Return the pixels of an image, or the reason why it cannot be read."""
    try:
        return read_image(task.path)
    except DcrisError as error:
        return str(error)


def _drained(predictions: list[Prediction]) -> Iterator[Prediction]:
    """Yield the predictions, whose probabilities are freed when their files are written."""
    predictions.reverse()
    while predictions:
        yield predictions.pop()


def _until_error(frames: Iterator[Frame]) -> Iterator[Frame | str]:
    """Yield the frames, then the reason if a frame cannot be read.

    Errors raised by the consumer are not caught.
    """
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except DcrisError as error:
            yield str(error)
            return
        yield frame


def _same_addresses(addresses: Iterable[str]) -> Iterator[str]:
    """Yield a line if images have the same address, so that Label Studio shows one of them with the
    masks of all."""
    shared = {address: number for address, number in Counter(addresses).items() if number > 1}
    if shared:
        yield (
            f"label-studio: {sum(shared.values()):,} images share the address of another one, such as {next(iter(shared))}, "
            "and Label Studio shows the same image for them; give each folder in a call of its own, with its --image-url"
        )


def long_phrases(unread: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each phrase that is longer than the model reads, if there are few."""
    for phrase, end in islice(unread.items(), _MAX_LISTED):
        yield long_phrase_warning(phrase, end)
    if len(unread) > _MAX_LISTED:
        yield f"{len(unread) - _MAX_LISTED:,} more phrases are longer than the model reads; see `unread` in the results"


def failures(reasons: Sequence[str], count: int, problem: str) -> str:
    """Return one sentence for all of `count` images or videos that have a problem."""
    if count == 1:
        return reasons[0]
    more = f"; and {len(reasons) - 3:,} more" if len(reasons) > 3 else ""
    return f"{len(reasons):,} of {count:,} {problem}, all others are done: {'; '.join(reasons[:3])}{more}"
