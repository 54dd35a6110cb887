"""`dcris evaluate --dataset` of a data set of videos: predict a split and score it."""

import argparse
import json
import tempfile
from pathlib import Path

from dcris.cli.common import output, progress, refuse_given
from dcris.utils.streams import note

_OTHERS = ("split_by", "none_rule", "boundary", "by_category", "report", "answers", "calibrate_on", "mask_threshold")
"""Arguments that are for images."""


def evaluate_videos(args: argparse.Namespace) -> None:
    """Predict the masks of a split in a temporary folder, score them, and print the result.

    Raises:
        DcrisError: an argument is for images, the truth is not public, or as VideoSetPredictor and
            score_videos.
    """
    from datetime import timedelta

    from dcris.checkpoints.backbones import fingerprint
    from dcris.data.tokenizer import strips
    from dcris.data.video_readers.load import load_videos
    from dcris.evaluation.video_protocols import get_video_protocol, mask_folders, require_truth, score_videos
    from dcris.evaluation.video_results import video_record
    from dcris.inference.segmenter import Segmenter
    from dcris.inference.video_sets import FrameDone, VideoOptions, VideoSetPredictor
    from dcris.utils.device import device_name, precision_of
    from dcris.utils.distributed import processes
    from dcris.utils.files import write_json

    refuse_given(args, _OTHERS, f"is for images, not for {args.dataset}")
    protocol = get_video_protocol(args.dataset, args.protocol)
    videos = load_videos(args.data, args.dataset, args.split or "val")
    require_truth(videos)
    with processes(args.device, timeout=timedelta(days=7)) as group, tempfile.TemporaryDirectory() as own:
        folder = Path(group.from_first(lambda: own))
        segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
        options = VideoOptions(batch=args.batch_size, refine=args.refine)
        predictor = VideoSetPredictor(segmenter, videos, folder, options, group)
        with progress(predictor.remaining(), "frame", group.first) as show:
            done = 0
            for event in predictor.run():
                done += isinstance(event, FrameDone)
                show(done)
        if not group.first:
            return
        for sentence in predictor.notes:
            note(sentence)
        with progress(len(mask_folders(videos)), "clip") as show:
            results = score_videos(predictor.masks, videos, protocol, progress=show)
        settings, data = predictor.settings, segmenter.config.data
    record = {
        **video_record(results, videos, protocol),
        "mask_threshold": settings.threshold,  # not `threshold`, which only results of images have
        "weights_sha256": fingerprint(segmenter.model.state_dict()),
        "precision": precision_of(segmenter.dtype),
        "device": device_name(segmenter.device),
        **({"refine": args.refine} if args.refine != "none" else {}),
        **({"strip_phrases": data.strip_phrases} if strips(data, predicting=False) else {}),
    }
    try:
        if args.out is not None:
            write_json(args.out, record)
    finally:
        output(json.dumps({key: value for key, value in record.items() if key not in ("rows", "analysis")}, indent=2))
