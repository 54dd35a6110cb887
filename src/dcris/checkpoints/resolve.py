"""Whatever names a trained model -> a place on this machine that dcris.checkpoints.checkpoint can load.

A run, a checkpoint's directory and a bundle are places already. "owner/name" is a repository of the Hub in our format, fetched
into the Hub's cache. "detris-b-refcoco" and so on are published DETRIS checkpoints, fetched and converted once into
$DCRIS_CACHE (by default ~/.cache/dcris).
"""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dcris.checkpoints.convert_detris import convert_file, data_set_of
from dcris.checkpoints.model_zoo import PUBLISHED, REPOSITORY, Published
from dcris.errors import DcrisError
from dcris.utils.files import expand_home, make_directory, read_json, write_json
from dcris.utils.hub import FileMissingError, HubFile, fetch, list_files
from dcris.utils.streams import note

Say = Callable[[str], None]


def locate(source: str | Path, *, towers: bool = True, log: Say = note) -> Path:
    """The directory or bundle on this machine that `source` names; what is not here yet is fetched.

    Args:
        source: the path of a run, checkpoint directory or bundle; or, as a string that is no path here, a published
            checkpoint's short name, or the Hub's "owner/name" or "owner/name@revision".
        towers: fetch a repository's frozen towers, too, where it has them.
        say: told what was fetched and converted.

    Raises DcrisError where the name means nothing, and where fetching or converting fails.
    """
    path = expand_home(source)
    with suppress(OSError, ValueError):  # a name that no path can have
        if isinstance(source, Path) or path.exists():
            return path
    source = str(source)
    if source in PUBLISHED:
        return _published(source, log)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", source, re.ASCII) and not _is_local(source):
        return _repository(source, towers)
    if "detris" in source and "/" not in source:
        raise DcrisError(f"there is no published model {source!r}; there are {', '.join(PUBLISHED)}")
    raise DcrisError(
        f"there is no checkpoint {source}; give a run's directory, as made by `dcris train --out`, a .safetensors bundle, "
        "owner/name on the Hub, or the name of a published model such as detris-b-refcoco"
    )


def _is_local(source: str) -> bool:
    """Whether a name that could be a repository's is more likely a mistyped path. With @REVISION it is a repository's."""
    first = source.partition("/")[0]
    known = first in ("runs", "checkpoints", "outputs") or Path(first).exists()
    return "@" not in source and (
        known or Path(source).suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".json")
    )


def cache_folder() -> Path:
    """Where converted checkpoints are kept. Raises DcrisError where that is not known or cannot be written."""
    advice = "set DCRIS_CACHE to a folder for converted checkpoints and HF_HOME to one for downloads"
    folder = expand_home(os.environ.get("DCRIS_CACHE") or "~/.cache/dcris", advice)
    try:
        return make_directory(folder)
    except DcrisError as error:
        raise DcrisError(f"{error}; {advice}") from error


def _repository(source: str, towers: bool) -> Path:
    repo, _, revision = source.partition("@")
    try:
        config = fetch(repo, revision or "main", ["config.json"])
        # All from one commit, wherever the branch is by now.
        fetch(repo, config.commit, ["model.safetensors"])
    except FileMissingError as error:
        raise DcrisError(f"{repo} on the Hub is not a dcris model: {error}") from error
    except DcrisError as error:
        raise DcrisError(f"there is no file or folder {source} here, and on the Hub: {error}") from error
    if towers:
        with suppress(FileMissingError):  # its configuration then names them
            fetch(repo, config.commit, ["towers.safetensors"])
    return config.path.parent


def _published(name: str, log: Say) -> Path:
    model, folder = PUBLISHED[name], cache_folder()
    out = folder / name
    if out.is_dir():  # directories are written whole or not at all
        return out
    wanted = model.file or _find(name, model)
    log(f"{name}: fetching {wanted} of {REPOSITORY} from the Hub, unless it is cached there")
    file = fetch(REPOSITORY, "main", [wanted])
    checksum = _check(file, model, folder / "sha256.json")
    log(f"{name}: converting it, once, into {out}")
    origin = {"name": name, "source": f"{REPOSITORY}/{file.name}", "revision": file.commit, "sha256": checksum}
    convert_file(file.path, out, model.word_length, origin)
    return out


def _find(name: str, model: Published) -> str:
    """The file of a checkpoint whose name is not known beforehand. Raises DcrisError unless exactly one fits."""
    files = [file for file in list_files(REPOSITORY) if file.endswith(".pth")]
    mixed = [file for file in files if "mix" in file.lower()]
    if model.size == "mix":
        fitting = mixed
    else:
        wanted = (model.dataset, model.split_by, model.word_length)
        fitting = [
            file
            for file in files
            if file not in mixed and model.size in file.lower() and data_set_of(Path(file).stem) == wanted
        ]
    if len(fitting) != 1:
        found = f"several files fit {name}: {', '.join(fitting)}" if fitting else f"none of its files is {name}"
        raise DcrisError(
            f"{REPOSITORY} on the Hub has {', '.join(files) or 'no .pth files'}, and {found}; download the right one and give "
            "it to `dcris convert`"
        )
    return fitting[0]


def _check(file: HubFile, model: Published, record: Path) -> str:
    """The file's SHA-256, if it is the known one; one that is not known is recorded when it is first seen.

    Raises DcrisError where it is another.
    """
    with file.path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    seen = read_json(record, "the record of checksums") if record.exists() else {}
    if not isinstance(seen, dict):
        raise DcrisError(f"{record} is not a record of checksums; delete it")
    expected = model.sha256 or seen.get(file.name, found)
    if found != expected:
        raise DcrisError(
            f"{file.name} of {REPOSITORY} is not the file that was published: its SHA-256 is {found}, not {expected}; delete "
            f"{file.path} and fetch it again, or, if you trust it, give it to `dcris convert`"
        )
    if model.sha256 is None and file.name not in seen:
        write_json(record, {**seen, file.name: found})
    return found
