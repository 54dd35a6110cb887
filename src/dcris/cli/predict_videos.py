"""`dcris predict --data`: the masks of a data set of videos, as its server takes them."""

import argparse

from dcris.cli.common import detail, log, progress
from dcris.errors import DcrisError
from dcris.utils.streams import counted

_OTHERS = {
    "images": "IMAGE_OR_FOLDER",
    "expression": "-e",
    "phrases": "--phrases",
    "pairs": "--pairs",
    "recursive": "--recursive",
    "format": "--format",
    "image_url": "--image-url",
    "json": "--json",
}
"""Arguments that are not for data sets, and how they are written."""


def predict_videos(args: argparse.Namespace, threshold: float | None) -> None:
    """Predict a split of a data set of videos.

    Args:
        args: of the command.
        threshold: the value of --threshold.

    Raises:
        DcrisError: an argument is missing or not for data sets, or as VideoSetPredictor.
    """
    from datetime import timedelta

    from tqdm import tqdm

    from dcris.data.submissions import SUBMISSIONS
    from dcris.data.video_readers.load import load_videos
    from dcris.inference.segmenter import FRAMES_AT_ONCE, Segmenter
    from dcris.inference.video_sets import FrameDone, VideoDone, VideoOptions, VideoSetPredictor
    from dcris.utils.distributed import processes

    given = [option for name, option in _OTHERS.items() if getattr(args, name)]
    if args.every != 1:
        given.append("--every")
    if given:
        raise DcrisError(f"--data takes images and phrases from a data set; leave out {', '.join(given)}")
    if args.dataset not in SUBMISSIONS or args.split is None:
        raise DcrisError(f"--data needs --dataset, one of {', '.join(SUBMISSIONS)}, and --split")
    videos = load_videos(args.data, args.dataset, args.split)
    options = VideoOptions(
        batch=args.batch_size or FRAMES_AT_ONCE,
        smooth=args.smooth or 1,
        threshold=threshold,
        min_score=args.min_score,
        min_area=args.min_area,
        refine=args.refine,
        overwrite=args.overwrite,
    )
    with processes(args.device, timeout=timedelta(days=7)) as group:
        segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
        predictor = VideoSetPredictor(segmenter, videos, args.out, options, group)
        if group.first:
            for note in predictor.notes:
                log(note)
            if predictor.already:
                log(f"{predictor.already:,} of {len(videos.videos):,} videos are done already in {args.out}")
        frames = 0
        with progress(predictor.remaining(), "frame", group.first) as show:
            for event in predictor.run():
                if isinstance(event, FrameDone):
                    frames += 1
                    show(frames)
                    continue
                with tqdm.external_write_mode():
                    if isinstance(event, VideoDone):
                        detail(
                            f"{event.video}: {counted(event.frames, 'frame')}, {counted(event.expressions, 'expression')}, "
                            f"{event.seconds:.1f} s"
                        )
                    else:
                        log(f"{event.video}: skipped; {event.reason}")
        if group.first:
            made = predictor.archive if predictor.form.zipped else predictor.masks
            counts = f"{counted(len(videos.expressions), 'expression')} of {counted(len(videos.videos), 'video')}"
            log(f"{made}: {args.dataset} ({args.split}), {counts}")
