"""`dcris data fetch`: download annotations, into the REFER layout, and the images they need.

The university server with the original annotations of RefCOCO is offline; jxu124's copies on the
Hub have all their fields. The written files differ from the release in one way: instances.json
contains the referred objects, not all objects of each image. RefCOCO-M's Parquet files, which
contain the images, are written in the REFER layout, too. The authors of gRefCOCO, RefSegRS and
GSEval have their own files on the Hub, which are copied.
"""

import json
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dcris.data import coco
from dcris.data.download_images import WantedImage, download_images, open_source
from dcris.data.images import image_size
from dcris.data.readers import refer_layout
from dcris.data.readers.load import has_references, load_references
from dcris.data.readers.parquet import (
    embedded_images,
    images_to_refer,
    refer_split,
    require_pyarrow,
    split_in_name,
    to_refer,
)
from dcris.data.registry import DATASETS, PARTITIONS, VIDEO_SETS, Dataset
from dcris.data.table import ReferenceTable, bad
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import make_directory, open_zip, write_file
from dcris.utils.hub import fetch, list_files
from dcris.utils.streams import counted, note

_BYTES_PER_IMAGE = 165_000
"""Average: train2014 has 82,783 images in 13.5 GB."""


def fetch_dataset(
    dataset: str,
    root: Path,
    *,
    splits: Sequence[str] | None = None,
    images: str | None = None,
    connections: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceTable:
    """Download a data set into `root`, in the REFER layout: annotations and images.

    Existing annotations that have the splits, and existing images of the right size, are kept. So
    the same call continues after an interruption, and a call with other splits adds these.

    Args:
        dataset: refcoco, refcoco+, refcocog, grefcoco, refcoco-m, refsegrs or gseval.
        root: folder of the data sets.
        splits: as REFER names them; default: all.
        images: the URL of a mirror of the images, or a folder or zip file to copy from; default:
            COCO's server, or the Hub where it has the images.
        connections: number of images downloaded at a time.
        progress: receives the number of images done and to do.

    Returns:
        The table of the data set.

    Raises:
        DcrisError: the annotations cannot be downloaded or used, the disk lacks space, or some
            images could not be obtained (after all others were).
    """
    facts = _downloadable(dataset, root)
    images = images or coco.IMAGE_SERVER.format(facts.server_folder)
    source = open_source(images)  # first: a mistyped path should not cost the download of the annotations
    table = _fetch_annotations(dataset, facts, root, splits)
    references = [reference for name in splits or table.splits() for reference in table.split(name)]
    needed = {reference.image_path: reference for reference in references}
    missing = [
        WantedImage(path.name, path, reference.image_size)
        for path, reference in needed.items()
        if not _image_exists(reference)
    ]
    _require_space(root, dataset, len(needed), len(missing), images)
    failures = download_images(missing, source, connections=connections, progress=progress)
    if failures:
        more = f" and {len(failures) - 5:,} more" if len(failures) > 5 else ""
        raise DcrisError(
            f"{len(failures):,} of {len(needed):,} images could not be obtained: {', '.join(failures[:5])}{more}; all others "
            f"are in {missing[0].path.parent}; run the same command again, or copy the missing ones there"
        )
    return table


def _image_exists(reference: Reference) -> bool:
    """Return whether the image exists with the annotated size."""
    try:
        return image_size(reference.image_path) == reference.image_size
    except DcrisError:
        return False


def _require_space(root: Path, dataset: str, needed: int, missing: int, source: str) -> None:
    """Print what will be downloaded. Raises DcrisError if the disk lacks the space for it."""
    if not missing:
        note(f"{dataset}: all {needed:,} images exist")
        return
    free, size = shutil.disk_usage(make_directory(root)).free, missing * _BYTES_PER_IMAGE
    existing = f"; {needed - missing:,} exist" if needed > missing else ""
    note(
        f"{dataset}: {counted(missing, 'image')} from {source}, about {_format_size(size)} "
        f"({_format_size(free)} free){existing}"
    )
    if free < size:
        raise DcrisError(
            f"the images need about {_format_size(size)}, but {root} has {_format_size(free)} free; free some space, choose "
            "fewer --splits, or another --out"
        )


def _format_size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _downloadable(dataset: str, root: Path) -> Dataset:
    """Return the facts of a data set that is on the Hub; raise DcrisError for others."""
    facts = DATASETS.get(dataset)
    published = facts or VIDEO_SETS.get(dataset)
    if published is not None and published.source:
        raise DcrisError(f"{dataset} is not on the Hub; get it from {published.source.replace('ROOT', str(root))}")
    if facts is None or facts.repository is None:
        known = (name for name, each in DATASETS.items() if each.repository is not None)
        raise DcrisError(f"there is no data set {dataset} to download; choose from {', '.join(known)}")
    return facts


# ---- annotations ---------------------------------------------------------------------------------


def _fetch_annotations(dataset: str, facts: Dataset, root: Path, splits: Sequence[str] | None) -> ReferenceTable:
    """Return the table with at least these splits.

    That is the existing one, or a new one from the Hub, which is written to `root`.
    """
    split_by, repo = facts.split_by, str(facts.repository)
    official = list(PARTITIONS[dataset, split_by].splits)
    unknown = [name for name in splits or () if name not in official]
    if unknown:
        raise DcrisError(f"{dataset} has no split {unknown[0]!r}; choose from {', '.join(official)}")
    if copy := _COPIED.get(dataset):
        if has_references(root, dataset, split_by):
            note(f"{dataset}: the annotations exist")
        else:
            note(f"{dataset}: {facts.files[0]} from {repo} on the Hub (or its cache)")
            copy(fetch(repo, "main", facts.files, "dataset").path, root)
        return load_references(root, dataset, split_by)
    present: list[str] = []
    if refer_layout.find(root, dataset, split_by):
        table = refer_layout.load(root, dataset, split_by)
        present = list(table.splits())
        if set(splits or official) <= set(present):
            note(f"{dataset}: the annotations exist ({', '.join(present)})")
            return table
    _refuse_overwriting(root / dataset, split_by, refer_layout.find(root, dataset), set(present) - set(official))
    if names := facts.files:
        note(f"{dataset}: the annotations from {repo} on the Hub (or its cache)")
        return _copy_annotations(dataset, repo, names, split_by, root)
    wanted = [name for name in official if name in {*(splits or official), *present}]
    note(f"{dataset}: the annotations of {', '.join(wanted)} from {repo} on the Hub (or its cache)")
    files, commit = _download_annotations(dataset, repo, wanted)
    records, content = images_to_refer(files) if dataset == "refcoco-m" else to_refer(files, dataset)
    folder = root / dataset
    # Check before anything is written.
    references = refer_layout.read_records(records, folder, refer_layout.Instances.read(content, folder, root))
    content = {"info": {"description": f"{dataset} ({split_by}) from {repo} on the Hub", "version": commit}, **content}
    # In this order, an interruption leaves annotations or images without references, not references
    # without annotations; the same command then starts here again.
    write_file(folder / "instances.json", json.dumps(content))
    if dataset == "refcoco-m":
        _write_images(files, references)
    write_file(folder / f"refs({split_by}).p", pickle.dumps(records, protocol=2))
    return refer_layout.load(root, dataset, split_by)


def _write_images(files: Mapping[Path, str], references: Sequence[Reference]) -> None:
    """Write the images in the Parquet files of RefCOCO-M that do not exist."""
    missing = {each.image_path.name: each for each in references if not _image_exists(each)}
    for path in files:
        for name, content in embedded_images(path):
            if (reference := missing.get(name)) is not None:
                if image_size(content) != reference.image_size:
                    raise bad(path, f"the image {name} has another size than its masks")
                write_file(reference.image_path, content)


def _copy_gseval(path: Path, root: Path) -> None:
    write_file(root / "GSEval" / path.name, path.read_bytes())


_MEMBER = re.compile(r"(?:.*/)?((?:images|masks)/[^/]+\.tif|output_phrase_(?:train|val|test)\.txt)")
_MAX_MEMBER, _MAX_UNPACKED = 50_000_000, 20_000_000_000
"""Bytes of a file in RefSegRS.zip and of all; the official ones are images of 512 x 512 pixels,
3 GB together."""


def _unpack_refsegrs(path: Path, root: Path) -> None:
    """Unpack the images, masks and phrases of RefSegRS.zip, the phrases last, since they make the
    data set."""
    try:
        with open_zip(path) as archive:
            found = {
                match[1]: member
                for member in archive.infolist()
                if "__MACOSX" not in member.filename and (match := _MEMBER.fullmatch(member.filename))
            }
            total = sum(member.file_size for member in found.values())
            if not any(name.endswith(".txt") for name in found):
                raise bad(path, "it has no output_phrase_train.txt, output_phrase_val.txt or output_phrase_test.txt")
            if total > _MAX_UNPACKED or any(member.file_size > _MAX_MEMBER for member in found.values()):
                raise bad(path, f"it unpacks to {total:,} bytes, far more than RefSegRS has")
            free = shutil.disk_usage(make_directory(root)).free
            if free < total:
                raise DcrisError(
                    f"RefSegRS needs {_format_size(total)}, but {root} has {_format_size(free)} free; free some space, or "
                    "choose another --out"
                )
            for name in sorted(found, key=lambda name: name.endswith(".txt")):
                write_file(root / "RefSegRS" / name, archive.read(found[name]))
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise bad(path, f"it cannot be unpacked ({error})") from error


_COPIED: Mapping[str, Callable[[Path, Path], None]] = {"refsegrs": _unpack_refsegrs, "gseval": _copy_gseval}
"""Data sets that are copied as they are: functions of the downloaded file and the root."""


def _copy_annotations(dataset: str, repo: str, names: Sequence[str], split_by: str, root: Path) -> ReferenceTable:
    """Copy a repository's files of references and instances to `root`, if they can be used."""
    references = fetch(repo, "main", names[:1], "dataset")
    instances = fetch(repo, references.commit, names[1:], "dataset")
    table = refer_layout.load_files(references.path, instances.path, root, dataset, split_by)
    for file in (instances, references):  # in this order, as below
        write_file(root / dataset / file.name, file.path.read_bytes())
    return table


def _download_annotations(dataset: str, repo: str, splits: Sequence[str]) -> tuple[dict[Path, str], str]:
    """Download the Parquet files; return them with the split of each, and their commit."""
    require_pyarrow()  # before a download that could not be read
    names = [PurePosixPath(name) for name in list_files(repo, kind="dataset") if name.endswith(".parquet")]
    files: dict[Path, str] = {}
    commit = "main"
    for split in splits:
        of_split = [name for name in names if refer_split(dataset, split_in_name(name)) == split]
        if not of_split:
            raise DcrisError(f"{repo} on the Hub no longer has the split {split}; get {dataset} from a mirror")
        for name in of_split:
            file = fetch(repo, commit, [str(name)], "dataset")
            commit = file.commit  # all files from one commit, even if the branch moves meanwhile
            files[file.path] = split
    return files, commit


def _refuse_overwriting(folder: Path, split_by: str, found: Sequence[str], extra_splits: Collection[str]) -> None:
    """Raise DcrisError if new annotations would make other ones in the folder unusable."""
    others = [name for name in found if name != split_by]
    if others:
        raise DcrisError(
            f"{folder} contains refs({others[0]}).p, which needs the instances.json there; choose another --out"
        )
    if extra_splits:
        raise DcrisError(
            f"{folder}/refs({split_by}).p has splits that are not on the Hub ({', '.join(sorted(extra_splits))}) and would be "
            "lost; choose another --out"
        )
