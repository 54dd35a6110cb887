"""Files of repositories on the Hugging Face Hub, fetched once and kept in its cache.

Everything is huggingface_hub's: the cache (HF_HOME), HF_HUB_OFFLINE, HF_ENDPOINT, tokens, progress bars, and going on where a
connection broke. What is added here: one sentence for each way it can fail, and a look at the checksum of what arrived.
"""

import errno
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcris.errors import DcrisError

Kind = Literal["model", "dataset"]
"""The Hub keeps models and data sets apart: one name may stand for one of each."""


_PATIENCE = 5.0
"""Seconds to wait for the Hub's answer about a file that is not cached."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of the Hub in the local cache."""

    path: Path
    repo: str
    name: str
    commit: str
    """The commit that the revision asked for stood for."""


class FileMissingError(DcrisError):
    """The repository is there, at that revision, and has none of the files asked for."""


def fetch(repo: str, revision: str, names: Sequence[str], kind: Kind = "model") -> HubFile:
    """The first of the files `names` that the repository has at a revision (branch, tag or commit), from the cache or the Hub.

    A file in the cache needs no network where the revision is a commit; for a branch the Hub is asked whether it has moved,
    and the cached file serves where it cannot be reached.

    Raises FileMissingError where the repository has none of them; DcrisError where there is no such repository or revision;
    where the Hub cannot be reached, or is not to be, and the cache lacks the file; where the disk is full; and where what
    arrived is damaged.
    """
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if constants.HF_HUB_CACHE.startswith("~"):  # the library would make a folder of that name where it runs
        raise DcrisError(
            "there is no home folder for the Hub's cache, as HOME is not set; set HF_HOME to a folder for downloads and "
            "DCRIS_CACHE to one for converted checkpoints"
        )
    cached = {name: try_to_load_from_cache(repo, name, revision=revision, repo_type=kind) for name in names}
    # What is cached comes first: without a network, asking for any other name takes half a minute to fail.
    for name in sorted(names, key=lambda name: not isinstance(cached[name], str)):
        if cached[name] is _CACHED_NO_EXIST and re.fullmatch("[0-9a-f]{40}", revision):
            continue  # a commit will not get a file that it lacks
        if not isinstance(cached[name], str):
            _require_reachable(repo, name, revision, kind)
        try:
            path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind, library_name="dcris"))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # nothing is said of the repository: it could not be asked
                raise _explain(error, repo, revision, kind) from error
        except (
            Exception
        ) as error:  # each release has its own network library, and each of those its own family of errors
            raise _explain(error, repo, revision, kind) from error
        else:
            if str(path) != cached[name]:
                _verify(path, repo)
            # CACHE/models--.../snapshots/COMMIT/NAME, where a name may have folders in it
            return HubFile(path, repo, name, path.parents[name.count("/")].name)
    raise FileMissingError(f"{repo} at revision {revision} has no file {' or '.join(names)}; is the revision right?")


def _require_reachable(repo: str, name: str, revision: str, kind: Kind) -> None:
    """Raise DcrisError where the Hub does not answer at all: huggingface_hub would retry for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, repo_type=kind), timeout=_PATIENCE)
    except (HfHubHTTPError, ValueError):  # the Hub answered, or the name is invalid: hf_hub_download reports it
        return
    except Exception as error:  # as in fetch
        raise _unreachable(error, repo, kind) from error


def _unreachable(error: Exception, repo: str, kind: Kind) -> DcrisError:
    from huggingface_hub import constants

    reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
    return DcrisError(
        f"{repo} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}); "
        f"check the network, or {_instead(kind)}"
    )


def _instead(kind: Kind) -> str:
    return "give the path of a file in place of the name" if kind == "model" else "get the files from a mirror"


def list_files(repo: str, revision: str = "main", kind: Kind = "model") -> list[str]:
    """The names of a repository's files, as the Hub says now. Raises DcrisError where it cannot be asked."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise DcrisError(f"HF_HUB_OFFLINE forbids asking which files {repo} has; unset it once")
    try:
        return sorted(HfApi(library_name="dcris").list_repo_files(repo, revision=revision, repo_type=kind))
    except Exception as error:  # as in fetch
        raise _explain(error, repo, revision, kind) from error


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files as one commit to a repository, which is made where there is none; return its address.

    Raises DcrisError where the Hub cannot be reached or does not let this person write there.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise DcrisError(f"HF_HUB_OFFLINE forbids uploading to {repo}; unset it")
    api = HfApi(library_name="dcris")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # as in fetch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DcrisError(
            f"uploading to {repo} on {constants.ENDPOINT} failed ({reason}); check its name and that `hf auth login` was done "
            "with a token that may write"
        ) from error
    return f"{constants.ENDPOINT}/{repo}"


def _verify(path: Path, repo: str) -> None:
    """Compare a large file that has just arrived with its SHA-256, by which the cache names it; small ones have none.

    The size has been compared by huggingface_hub. This is done once: it takes a second or two per gigabyte.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            path.unlink()
            blob.unlink()
            raise DcrisError(
                f"{path.name} of {repo} arrived damaged: its SHA-256 is {found}, not {blob.name}; "
                "it has been deleted, so try again"
            )


def _explain(error: Exception, repo: str, revision: str, kind: Kind) -> DcrisError:
    """One sentence for what huggingface_hub, the network library below it or the disk said."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return DcrisError(
            f"{repo} is open only to people who accepted its terms; do so there, then run `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DcrisError(f"there is no repository {repo} on {constants.ENDPOINT}, or it is private (`hf auth login`)")
    if isinstance(error, errors.RevisionNotFoundError):
        return DcrisError(
            f"{repo} has no revision {revision}; give a branch, a tag or a whole commit hash, or leave it out"
        )
    file_instead = _instead(kind)
    if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError):
        return DcrisError(
            f"{repo} at revision {revision} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids fetching "
            f"it; unset that once, or {file_instead}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(error, repo, kind)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):  # hf_xet, which large files come through, has only words
        return DcrisError(
            f"the disk of the cache {constants.HF_HUB_CACHE} is full; free some space there, or set HF_HOME to another place"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return DcrisError(f"cannot write to the cache {constants.HF_HUB_CACHE}: {error.strerror or error}; set HF_HOME")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DcrisError(f"fetching {repo} from {constants.ENDPOINT} failed ({reason}); try again, or {file_instead}")
