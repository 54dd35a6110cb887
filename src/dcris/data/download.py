"""`dcris data fetch`: the annotations from the Hub, in REFER's layout, and the photographs that they are about.

The university server that gave the annotations out is gone; jxu124's copies on the Hub hold every field of them. What is
written differs from the release in one thing: instances.json has the objects referred to, not every object of each photograph.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from dcris.data.check import OFFICIAL_SIZES
from dcris.data.download_images import COCO, Photograph, download_images, open_source
from dcris.data.images import image_size
from dcris.data.readers.parquet import SPLIT_BY, refer_split, require_pyarrow, split_in_name, to_refer
from dcris.data.readers.refer import find_refer, load_refer, read_records
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import make_directory, write_file
from dcris.utils.hub import fetch, list_files
from dcris.utils.streams import note

REPOSITORIES = {"refcoco": "jxu124/refcoco", "refcoco+": "jxu124/refcocoplus", "refcocog": "jxu124/refcocog"}

_BYTES = 165_000
"""What a photograph takes up on the average: train2014 has 82,783 in 13.5 GB."""


def fetch_dataset(
    dataset: str,
    root: Path,
    *,
    splits: Sequence[str] | None = None,
    photographs: str = COCO,
    connections: int = 8,
    log: Callable[[str], None] = note,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceTable:
    """Put a data set into `root`, in REFER's layout: references, annotations, and the photographs that its splits need.

    What is there is kept: annotations that have the splits, and photographs of the right size. So the same call goes on where
    an earlier one ended, and one for other splits adds them.

    Args:
        dataset: refcoco, refcoco+ or refcocog.
        root: the folder of the data sets.
        splits: as REFER names them; all of them by default.
        photographs: COCO's server, the address of a mirror of its train2014, or a folder or a zip to copy from.
        connections: how many photographs are fetched at a time.
        say: told what is done and how much space it takes.
        progress: told how many of how many photographs are done.

    Raises DcrisError where the annotations cannot be had or used; where the disk lacks the space; and, when all others are
    there, where some photographs could not be had.
    """
    source = open_source(photographs)  # first: a mistyped path should not cost the annotations' download
    table = _annotations(dataset, root, splits, log)
    references = [reference for name in splits or table.splits() for reference in table.split(name)]
    every = {reference.image_path: reference for reference in references}
    missing = [
        Photograph(path.name, path, reference.image_size)
        for path, reference in every.items()
        if not _is_there(reference)
    ]
    _require_space(root, dataset, len(every), len(missing), photographs, log)
    failures = download_images(missing, source, connections=connections, progress=progress)
    if failures:
        more = f" and {len(failures) - 5:,} more" if len(failures) > 5 else ""
        raise DcrisError(
            f"{len(failures):,} of {len(every):,} photographs could not be had: {', '.join(failures[:5])}{more}; all others "
            f"are in {missing[0].path.parent}; run the same command again, or put these there from elsewhere"
        )
    return table


def _is_there(reference: Reference) -> bool:
    try:
        return image_size(reference.image_path) == reference.image_size
    except DcrisError:
        return False


def _require_space(
    root: Path, dataset: str, needed: int, missing: int, source: str, log: Callable[[str], None]
) -> None:
    """Say what is going to be fetched. Raises DcrisError where the disk lacks the space for it."""
    if not missing:
        log(f"{dataset}: all {needed:,} photographs are there")
        return
    free, size = shutil.disk_usage(make_directory(root)).free, missing * _BYTES
    there = f", and {needed - missing:,} are there" if needed > missing else ""
    log(f"{dataset}: {missing:,} photographs from {source}, about {_size(size)} ({_size(free)} are free){there}")
    if free < size:
        raise DcrisError(
            f"the photographs need about {_size(size)}, and {root} has {_size(free)} free; make space there, choose fewer "
            "--splits, or another --out"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


# ---- annotations ---------------------------------------------------------------------------------------------------------


def _annotations(dataset: str, root: Path, splits: Sequence[str] | None, log: Callable[[str], None]) -> ReferenceTable:
    """The table with at least these splits, from what is there, or else anew from the Hub, written to `root`."""
    if dataset not in REPOSITORIES:
        raise DcrisError(f"there is no data set {dataset} to fetch; choose from {', '.join(REPOSITORIES)}")
    split_by, repo = SPLIT_BY[dataset], REPOSITORIES[dataset]
    official = list(OFFICIAL_SIZES[dataset, split_by])
    unknown = [name for name in splits or () if name not in official]
    if unknown:
        raise DcrisError(f"{dataset} has no split {unknown[0]!r}; choose from {', '.join(official)}")
    present: list[str] = []
    if find_refer(root, dataset, split_by):
        table = load_refer(root, dataset, split_by)
        present = list(table.splits())
        if set(splits or official) <= set(present):
            log(f"{dataset}: the annotations are there ({', '.join(present)})")
            return table
    _refuse_overwriting(root / dataset, split_by, find_refer(root, dataset), set(present) - set(official))
    wanted = [name for name in official if name in {*(splits or official), *present}]
    log(f"{dataset}: the annotations of {', '.join(wanted)} from {repo} on the Hub, unless they are cached")
    files, commit = _download(dataset, repo, wanted)
    records, content = to_refer(files, dataset)
    folder = root / dataset
    read_records(records, folder, content, folder, root)  # before anything is written
    content = {"info": {"description": f"{dataset} ({split_by}) from {repo} on the Hub", "version": commit}, **content}
    # In this order an interruption leaves annotations with too many objects, never references without theirs.
    write_file(folder / "instances.json", json.dumps(content))
    write_file(folder / f"refs({split_by}).p", pickle.dumps(records, protocol=2))
    return load_refer(root, dataset, split_by)


def _download(dataset: str, repo: str, splits: Sequence[str]) -> tuple[dict[Path, str], str]:
    """The Parquet files of the splits in the Hub's cache, with the split of each, and the commit that they are from."""
    require_pyarrow()  # before a download that would be of no use without it
    names = [PurePosixPath(name) for name in list_files(repo, kind="dataset") if name.endswith(".parquet")]
    files: dict[Path, str] = {}
    commit = "main"
    for split in splits:
        of_split = [name for name in names if refer_split(dataset, split_in_name(name)) == split]
        if not of_split:
            raise DcrisError(f"{repo} on the Hub no longer has the split {split}; get {dataset} from a mirror")
        for name in of_split:
            file = fetch(repo, commit, [str(name)], "dataset")
            commit = file.commit  # all from one, wherever the branch is by now
            files[file.path] = split
    return files, commit


def _refuse_overwriting(folder: Path, split_by: str, found: Sequence[str], strange: Collection[str]) -> None:
    """Raise DcrisError where writing annotations would spoil others that are in the folder."""
    others = [name for name in found if name != split_by]
    if others:
        raise DcrisError(
            f"{folder} holds refs({others[0]}).p, which needs the instances.json there; choose another --out"
        )
    if strange:
        raise DcrisError(
            f"{folder}/refs({split_by}).p has splits that the Hub's has not ({', '.join(sorted(strange))}), which would be "
            "lost; choose another --out"
        )
