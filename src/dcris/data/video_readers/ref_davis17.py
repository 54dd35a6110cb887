"""Ref-DAVIS17: DAVIS of 2017 in 480p with its unsupervised annotations, and four texts an object.

DAVIS/{JPEGImages,Annotations_unsupervised}/480p/VIDEO/FRAME, DAVIS/ImageSets/2017/{train,val}.txt,
and davis_text_annotations/Davis17_annot{1,2}{,_full_video}.txt with lines `VIDEO OBJECT "TEXT"`:
two annotators, who saw the first frame and then the whole video. The files of annotator 2 are in
Latin-1, and three names of videos are misspelt. The files have videos of all splits.

Or what convert_davis_to_ytvos.py of ReferFormer makes of it, {train,valid}/{JPEGImages,Annotations}
and meta_expressions/{train,valid}/meta_expressions.json, where expression 4 * k + a is text a of
object k. Both are read into the same expressions; the conversion only if the original is not there.
Source: tools/data/convert_davis_to_ytvos.py and inference_davis.py of ReferFormer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dcris.data.table import OnError, bad, check_text, plain_name, shown, skip_errors
from dcris.data.video_readers.meta import META, Expressions, each_video, home_of, label, read_videos
from dcris.data.videos import LabelImages, VideoExpression, VideoSet
from dcris.errors import DcrisError
from dcris.utils.files import read_text, reading

_DATASET = "ref_davis17"
_SPLITS = {"train": "train", "valid": "val"}
"""Names of the lists of videos in ImageSets, by split."""
_TEXTS = (
    "Davis17_annot1.txt",
    "Davis17_annot1_full_video.txt",
    "Davis17_annot2.txt",
    "Davis17_annot2_full_video.txt",
)
MISSPELT = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
"""Names of videos in the texts, and what their folders are called."""


def find(root: Path) -> Sequence[str]:
    """Return the splits whose list of videos or file of expressions is there."""
    return [split for split in _SPLITS if _original(root, split) or _converted(root, split)]


def _original(root: Path, split: str) -> Path | None:
    home = home_of(root, _DATASET, f"DAVIS/ImageSets/2017/{_SPLITS[split]}.txt")
    return home if home is not None and (home / "davis_text_annotations").is_dir() else None


def _converted(root: Path, split: str) -> Path | None:
    return home_of(root, _DATASET, f"meta_expressions/{split}/{META}")


def load(root: Path, split: str, on_error: OnError | None = None) -> VideoSet:
    """Read a split in either form; see VideoReader.load."""
    misspelt: set[str] = set()
    if (home := _original(root, split)) is not None:
        frames, labels = home / "DAVIS/JPEGImages/480p", home / "DAVIS/Annotations_unsupervised/480p"
        expressions = list(_from_texts(home, split, frames, labels, misspelt, on_error))
    else:
        home = _converted(root, split)
        assert home is not None
        frames, labels = home / split / "JPEGImages", home / split / "Annotations"
        expressions = list(_from_meta(home / "meta_expressions" / split / META, on_error))
    names = ", ".join(f"{name} ({MISSPELT[name]})" for name in sorted(misspelt))
    notes = (f"names of videos that the texts misspell are corrected: {names}",) if misspelt else ()
    return VideoSet(_DATASET, split, frames, tuple(expressions), LabelImages(labels), notes)


def _from_texts(
    home: Path, split: str, frames: Path, labels: Path, misspelt: set[str], on_error: OnError | None
) -> Iterator[VideoExpression]:
    names = home / f"DAVIS/ImageSets/2017/{_SPLITS[split]}.txt"
    texts = [_read_texts(home / "davis_text_annotations" / name, misspelt, on_error) for name in _TEXTS]
    seen: set[str] = set()
    for number, line in enumerate(_lines(names), 1):
        if not (video := line.strip()):
            continue
        with skip_errors(on_error):
            if video in seen:
                raise bad(names, f"line {number} names the video {shown(video)} again")
            seen.add(video)
            plain_name(video, names, f"line {number}", "name")
            of_video = [each.get(video, {}) for each in texts]
            yield from _of_video(home, video, of_video, frames / video, labels / video)


def _of_video(
    home: Path, video: str, texts: list[dict[str, str]], folder: Path, labels: Path
) -> Iterator[VideoExpression]:
    """Yield the expressions of a video; expression 4 * k + a is text a of object k."""
    objects = sorted(texts[0], key=int)
    for name, each in zip(_TEXTS, texts, strict=True):
        if not each or each.keys() != texts[0].keys():
            raise bad(
                home / "davis_text_annotations" / name,
                f"it has texts for {_listed(each)} of video {shown(video)}, and {_TEXTS[0]} for {_listed(texts[0])}",
            )
    # Of both folders: no list names the frames, and one that was not unpacked would go unnoticed.
    files = (*folder.glob("*.jpg"), *labels.glob("*.png"))
    found = sorted({path.stem for path in files if not path.name.startswith(".")})
    if not found:
        raise DcrisError(f"there are no frames in {folder}; unpack DAVIS-2017-Unsupervised-trainval-480p.zip again")
    for place, target in enumerate(objects):
        for annotator, each in enumerate(texts):
            key = str(4 * place + annotator)
            yield VideoExpression(video, key, each[target], tuple(found), (target,), annotator)


def _listed(texts: dict[str, str]) -> str:
    return f"objects {', '.join(sorted(texts, key=int))}" if texts else "no object"


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 or Latin-1.

    Not by splitlines, which takes more for the end of a line: 0x85 is a letter in other codes.
    """
    with reading(path):
        return read_text(path, fallback="latin-1").split("\n")


def _read_texts(path: Path, misspelt: set[str], on_error: OnError | None) -> dict[str, dict[str, str]]:
    """Return the texts of a file by video and object; add the misspelt names to `misspelt`."""
    texts: dict[str, dict[str, str]] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        with skip_errors(on_error):
            where = f"line {number}"
            try:
                video, target, text = line.split(maxsplit=2)
            except ValueError:
                raise bad(path, f'{where} is not of the form VIDEO OBJECT "TEXT": {shown(line)}') from None
            misspelt |= {video} & MISSPELT.keys()
            of_video = texts.setdefault(MISSPELT.get(video, video), {})
            target = label(target, path, where)
            if target in of_video:
                raise bad(path, f"{where} is a second text for object {target} of video {shown(video)}")
            text = " ".join(text.split())
            of_video[target] = check_text(text[1:-1] if text[0] == '"' else text, path, where, "text")
    return texts


def _from_meta(path: Path, on_error: OnError | None) -> Iterator[VideoExpression]:
    for name, frames, records in each_video(path, read_videos(path), on_error):
        with skip_errors(on_error):
            yield from _of_record(path, name, frames, records)


def _of_record(path: Path, name: str, frames: tuple[str, ...], records: Expressions) -> Iterator[VideoExpression]:
    where = f"video {shown(name)}"
    if set(records) != {str(number) for number in range(len(records))} or len(records) % 4:
        raise bad(path, f"{where} does not have four expressions for each object, numbered from 0")
    targets = [
        label(records[str(number)].get("obj_id"), path, f"expression {number} of {where}")
        for number in range(len(records))
    ]
    if any(target != targets[number - number % 4] for number, target in enumerate(targets)):
        raise bad(path, f"{where} has four expressions in a row that do not describe the same object")
    for number, target in enumerate(targets):
        yield VideoExpression(name, str(number), records[str(number)]["exp"], frames, (target,), number % 4)
