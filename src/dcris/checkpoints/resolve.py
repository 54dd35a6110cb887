"""Find a trained model by path or name, and fetch it if necessary.

A run, a checkpoint directory and a bundle are used in place. "photos" and "tiny" are part of the
package. "owner/name" is a repository on the Hub in dcris's format, which is downloaded to the Hub's
cache. "detris-b-refcoco" etc. are published DETRIS checkpoints, which are downloaded and converted
once into $DCRIS_CACHE (default: ~/.cache/dcris).
"""

import re
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from importlib import resources
from itertools import islice
from pathlib import Path

from dcris.checkpoints.checkpoint import CALIBRATION, is_model
from dcris.checkpoints.convert_detris import convert_file, data_set_of
from dcris.checkpoints.model_zoo import PACKAGED, PUBLISHED, REPOSITORY, Published
from dcris.checkpoints.training_images import FILE
from dcris.errors import DcrisError
from dcris.utils.arguments import ALIKE, PathLike, as_path, did_you_mean
from dcris.utils.cache import cache_folder
from dcris.utils.files import expand_home, read_json, sha256_of, write_json
from dcris.utils.hub import FileMissingError, HubFile, UnreachableError, fetch, list_files
from dcris.utils.streams import note

Log = Callable[[str], None]

_MOST_NAMES = 1000
"""Names of a folder that are compared: each comparison takes time, and folders can be large."""


def locate(source: PathLike, *, towers: bool = True, log: Log = note) -> Path:
    """Return the local directory or bundle of `source`, after fetching it if necessary.

    Args:
        source: path of a run, checkpoint directory or bundle; or, as a string that is not an
            existing path, the name of a packaged model or a published checkpoint, or "owner/name"
            or "owner/name@revision" on the Hub.
        towers: also fetch the frozen towers of a repository, if it has them.
        log: receives a line before fetching and converting.

    Raises:
        DcrisError: there is no such model, or fetching or converting fails.
    """
    if not source or not isinstance(source, str):  # a str may be a name
        source = as_path(source, "a model")
    path = expand_home(source)
    if source in PACKAGED and not is_model(path):  # people have folders of photographs called photos
        return Path(str(resources.files("dcris.assets") / str(source)))
    with suppress(OSError, ValueError):  # not a possible path
        if isinstance(source, Path) or path.exists():
            return path
    source = str(source)
    if source in PUBLISHED:
        return _published(source, log)
    similar = _similar(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", source, re.ASCII) and not _is_local(source, similar):
        return _repository(source, towers)
    if "detris" in source and "/" not in source:
        raise DcrisError(f"there is no published model {source!r}; the available ones are {', '.join(PUBLISHED)}")
    hint = f" (did you mean {similar}?)" if similar else did_you_mean(source, PACKAGED)
    raise DcrisError(
        f"there is no checkpoint {source}{hint}; give the directory of a run "
        "(`dcris train --out`), a .safetensors bundle, owner/name or owner/name@main on the Hub, or the name of a model such "
        f"as {', '.join(PACKAGED)} or detris-b-refcoco"
    )


def _similar(path: Path) -> Path | None:
    """Return a model whose path differs from `path` by a typing mistake in its last two parts.

    None if there is none.
    """
    with suppress(OSError, ValueError):  # not a possible path
        parents = [path.parent] if path.parent.is_dir() else _alike(path.parent)
        return next((each for parent in parents for each in _alike(parent / path.name) if is_model(each)), None)
    return None


def _alike(path: Path) -> list[Path]:
    """Return the folders and bundles beside `path` with almost its name, the most similar first."""
    if not path.parent.is_dir():
        return []
    names = [each.name for each in islice(path.parent.iterdir(), _MOST_NAMES)]
    return [path.parent / name for name in get_close_matches(path.name, names, cutoff=ALIKE)]


def _is_local(source: str, similar: Path | None) -> bool:
    """Whether a name of the form owner/name is more likely a mistyped path.

    With @REVISION it is a repository.
    """
    first = source.partition("/")[0]
    known = similar is not None or first in ("runs", "checkpoints", "outputs") or Path(first).exists()
    return "@" not in source and (
        known or Path(source).suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".json")
    )


def _repository(source: str, towers: bool) -> Path:
    repo, _, revision = source.partition("@")
    try:
        config = fetch(repo, revision or "main", ["config.json"])
        # From the same commit, even if the branch has moved.
        fetch(repo, config.commit, ["model.safetensors"])
    except FileMissingError as error:
        raise DcrisError(f"{repo} on the Hub is not a dcris model: {error}") from error
    except DcrisError as error:
        raise DcrisError(f"there is no local file or folder {source}, and on the Hub: {error}") from error
    # Without them, the images are unknown, presence is not calibrated, and the configuration names
    # the towers, which have to match. Offline, a cache that another program filled does not tell
    # what the Hub lacks.
    for name in (FILE, CALIBRATION, *(["towers.safetensors"] if towers else [])):
        with suppress(FileMissingError, UnreachableError):
            fetch(repo, config.commit, [name])
    return config.path.parent


def _published(name: str, log: Log) -> Path:
    model, folder = PUBLISHED[name], cache_folder()
    out = folder / name
    if out.is_dir():  # directories are written completely or not at all
        return out
    wanted = model.file or _find(name, model)
    log(f"{name}: downloading {wanted} of {REPOSITORY}, unless it is cached")
    file = fetch(REPOSITORY, "main", [wanted])
    checksum = _check(file, model, folder / "sha256.json")
    log(f"{name}: converting it to {out} (only once)")
    origin = {"name": name, "source": f"{REPOSITORY}/{file.name}", "revision": file.commit, "sha256": checksum}
    convert_file(file.path, out, model.word_length, origin)
    return out


def _find(name: str, model: Published) -> str:
    """Find the file of a checkpoint whose file name is not known.

    Raises DcrisError unless exactly one file matches.
    """
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
        found = f"several files match {name}: {', '.join(fitting)}" if fitting else f"no file matches {name}"
        raise DcrisError(
            f"{REPOSITORY} on the Hub has {', '.join(files) or 'no .pth files'}, and {found}; download the right file and "
            "convert it with `dcris convert`"
        )
    return fitting[0]


def _check(file: HubFile, model: Published, record: Path) -> str:
    """Return the SHA-256 of the file.

    If the expected one is unknown, that of the first download is recorded and expected.

    Raises:
        DcrisError: it differs from the expected one.
    """
    found = sha256_of(file.path)
    seen = read_json(record, "the record of checksums") if record.exists() else {}
    if not isinstance(seen, dict):
        raise DcrisError(f"{record} is not a JSON object with checksums; delete it")
    expected = model.sha256 or seen.get(file.name, found)
    if found != expected:
        raise DcrisError(
            f"{file.name} of {REPOSITORY} is not the file that was published: its SHA-256 is {found}, not {expected}; delete "
            f"{file.path} and download it again, or, if you trust it, convert it with `dcris convert`"
        )
    if model.sha256 is None and file.name not in seen:
        write_json(record, {**seen, file.name: found})
    return found
