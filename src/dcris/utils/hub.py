"""Download files from the Hugging Face Hub into its cache.

huggingface_hub does the work: the cache (HF_HOME), HF_HUB_OFFLINE, HF_ENDPOINT, tokens, progress
bars, and resuming a broken download. Added here: a message for each kind of failure, and a
comparison of the checksum.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcris.errors import DcrisError, first_line
from dcris.utils.files import FULL, sha256_of

Kind = Literal["model", "dataset"]
"""Kind of repository: a model and a data set on the Hub can have the same name."""


_TIMEOUT = 5.0
"""Seconds to wait for the Hub's answer about a file that is not cached."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of the Hub in the local cache."""

    path: Path
    repo: str
    name: str
    commit: str
    """The commit that the requested revision stood for."""


class FileMissingError(DcrisError):
    """The repository exists at that revision, but has none of the requested files."""


class UnreachableError(DcrisError):
    """A file is not cached, and the Hub cannot be reached or HF_HUB_OFFLINE is set."""


def fetch(repo: str, revision: str, names: Sequence[str], kind: Kind = "model") -> HubFile:
    """Return the first of several files that a repository has, from the cache or the Hub.

    A cached file needs no network if the revision is a commit. For a branch, the Hub is asked
    whether it has moved; if the Hub cannot be reached, the cached file is used.

    Args:
        repo: owner/name.
        revision: branch, tag or commit.
        names: of the files, in order of preference.
        kind: of the repository.

    Raises:
        FileMissingError: the repository has none of the files.
        UnreachableError: the file is not cached, and the Hub cannot be asked for it.
        DcrisError: the repository or revision does not exist; the disk is full; the file arrived
            damaged.
    """
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if constants.HF_HUB_CACHE.startswith("~"):  # huggingface_hub would create a folder named ~
        raise DcrisError(
            "there is no home folder for the Hub's cache, because HOME is not set; set HF_HOME to a folder for downloads, and "
            "DCRIS_CACHE to one for converted checkpoints"
        )
    cached = {name: try_to_load_from_cache(repo, name, revision=revision, repo_type=kind) for name in names}
    # Cached files first: without a network, requesting another name takes half a minute to fail.
    for name in sorted(names, key=lambda name: not isinstance(cached[name], str)):
        if cached[name] is _CACHED_NO_EXIST and re.fullmatch("[0-9a-f]{40}", revision):
            continue  # a commit does not change, so the file is still missing
        if not isinstance(cached[name], str):
            _require_reachable(repo, name, revision, kind)
        try:
            path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind, library_name="dcris"))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub could not be asked whether the file exists
                raise _explain(error, repo, revision, kind) from error
        # Any exception: releases use different network libraries, each with its own exceptions.
        except Exception as error:
            raise _explain(error, repo, revision, kind) from error
        else:
            if str(path) != cached[name]:
                _verify(path, repo)
            # CACHE/models--.../snapshots/COMMIT/NAME, where a name may have folders in it
            return HubFile(path, repo, name, path.parents[name.count("/")].name)
    raise FileMissingError(f"{repo} at revision {revision} has no file {' or '.join(names)}; check the revision")


def _require_reachable(repo: str, name: str, revision: str, kind: Kind) -> None:
    """Raise DcrisError if the Hub does not answer; huggingface_hub would retry for 30 s."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, repo_type=kind), timeout=_TIMEOUT)
    except (HfHubHTTPError, ValueError):  # the Hub answered, or the name is invalid: hf_hub_download reports it
        return
    except Exception as error:  # see fetch
        raise _unreachable(error, repo, kind) from error


def _unreachable(error: Exception, repo: str, kind: Kind) -> UnreachableError:
    from huggingface_hub import constants

    reason = first_line(error.__cause__ or error)
    return UnreachableError(
        f"{repo} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}); "
        f"check the network, or {_instead(kind)}"
    )


def _instead(kind: Kind) -> str:
    return "use the path of a file instead of the name" if kind == "model" else "get the files from a mirror"


def list_files(repo: str, revision: str = "main", kind: Kind = "model") -> list[str]:
    """Return the names of a repository's files, asking the Hub.

    Raises:
        DcrisError: it cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise DcrisError(f"HF_HUB_OFFLINE is set, but the list of files of {repo} is needed; unset it for this command")
    try:
        return sorted(HfApi(library_name="dcris").list_repo_files(repo, revision=revision, repo_type=kind))
    except Exception as error:  # see fetch
        raise _explain(error, repo, revision, kind) from error


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload the files of a folder to a repository as one commit, and return its address.

    Args:
        folder: with the files.
        repo: owner/name; created if missing.
        private: whether a new repository is private.
        message: of the commit.

    Raises:
        DcrisError: the Hub cannot be reached, or the user may not write there.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise DcrisError(f"HF_HUB_OFFLINE is set, so nothing is uploaded to {repo}; unset it")
    api = HfApi(library_name="dcris")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # see fetch
        raise DcrisError(
            f"uploading to {repo} on {constants.ENDPOINT} failed ({first_line(error)}); check its name, and run `hf auth "
            "login` with a token that has write access"
        ) from error
    return f"{constants.ENDPOINT}/{repo}"


def _verify(path: Path, repo: str) -> None:
    """Compare a downloaded file with its SHA-256.

    Only large files have one: it is their name in the cache.

    huggingface_hub has compared the size. Done only after the download, because it takes 1 to 2
    seconds per gigabyte.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        found = sha256_of(blob)
        if found != blob.name:
            path.unlink()
            blob.unlink()
            raise DcrisError(
                f"{path.name} of {repo} arrived damaged: its SHA-256 is {found}, not {blob.name}; "
                "it was deleted; try again"
            )


def _explain(error: Exception, repo: str, revision: str, kind: Kind) -> DcrisError:
    """Return a DcrisError for an error of huggingface_hub, its network library or the disk."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return DcrisError(f"{repo} requires accepting its terms; accept them on the Hub, then run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DcrisError(
            f"there is no repository {repo} on {constants.ENDPOINT}, or it is private (run `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DcrisError(f"{repo} has no revision {revision}; use a branch, a tag or a full commit hash, or omit it")
    file_instead = _instead(kind)
    if constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError):
        return UnreachableError(
            f"{repo} at revision {revision} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it "
            f"for this command, or {file_instead}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(error, repo, kind)
    full = isinstance(error, OSError) and error.errno in FULL
    if full or "No space left on device" in str(error):  # hf_xet, which downloads large files, raises it as text only
        return DcrisError(
            f"the disk of the cache {constants.HF_HUB_CACHE} is full; free disk space there, or set HF_HOME to another folder"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return DcrisError(f"cannot write to the cache {constants.HF_HUB_CACHE}: {error.strerror or error}; set HF_HOME")
    return DcrisError(
        f"downloading {repo} from {constants.ENDPOINT} failed ({first_line(error)}); try again, or {file_instead}"
    )
