"""What is remembered between commands about files that do not change."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dcris.utils import cache
from dcris.utils.cache import file_state, remembered


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for which every file has been unchanged for long enough."""
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SETTLED", -(10**12))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_text("one")
    return path


def counting(path: Path, times: list[str]) -> Callable[[], str]:
    def compute() -> str:
        times.append(path.read_text())
        return times[-1]

    return compute


def test_an_unchanged_file_is_read_once(weights: Path) -> None:
    times: list[str] = []
    assert [remembered(file_state(weights), "a", counting(weights, times)) for _ in range(3)] == ["one"] * 3
    assert len(times) == 1
    remembered(file_state(weights), "b", counting(weights, times))
    assert len(times) == 2, "a result for another purpose was taken"


def test_other_content_is_noticed_whatever_its_time(weights: Path) -> None:
    """An attacker can give a file any size and time of modification; the weights must not be
    trusted for it."""
    before = weights.stat()
    assert remembered(file_state(weights), "", counting(weights, [])) == "one"
    weights.write_text("two")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert remembered(file_state(weights), "", counting(weights, [])) == "two"


@pytest.mark.parametrize("known", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(known: bool, weights: Path) -> None:
    """Another process may put other weights in its place between reading and asking."""
    if known:
        remembered(file_state(weights), "", lambda: "one")
    before = file_state(weights)
    weights.with_name("new").write_text("two")
    weights.with_name("new").replace(weights)
    assert remembered(before, "", lambda: "what was read") == "what was read"
    assert remembered(file_state(weights), "", counting(weights, [])) == "two"
    assert remembered(before, "", lambda: "again") == "again", "what was read of two files was remembered"


def test_a_file_that_has_just_changed_is_not_remembered(
    weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change may follow within one tick of the file system's clock."""
    monkeypatch.setattr(cache, "_SETTLED", 10**12)
    assert remembered(file_state(weights), "", counting(weights, [])) == "one"
    assert not (folder / "checksums.json").exists()


def test_a_file_that_is_removed_while_it_is_read(weights: Path) -> None:
    """It has been read, so the command goes on."""
    remembered(file_state(weights), "", lambda: "known")
    state = file_state(weights)

    def compute() -> str:
        weights.unlink(missing_ok=True)
        return "what was read"

    assert remembered(state, "other", compute) == "what was read"
    assert remembered(state, "", compute) == "what was read"


def test_other_users_cannot_vouch_for_weights(weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several users may share the folder: one could give weights the checksum of others."""
    path = folder / "checksums.json"
    before = os.umask(0)  # of users who share files in a group
    try:
        remembered(file_state(weights), "", lambda: "one")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    times: list[str] = []
    forged = dict.fromkeys(json.loads(path.read_text()), "forged")
    path.write_text(json.dumps(forged))
    assert remembered(file_state(weights), "", counting(weights, times)) == "forged", "the entry is not this one"
    for mode in (0o620, 0o602):
        path.write_text(json.dumps(forged))
        path.chmod(mode)
        assert remembered(file_state(weights), "", counting(weights, times)) == "one"
    path.write_text(json.dumps(forged))
    if (user := os.geteuid()) == 0:
        os.chown(path, 1, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert remembered(file_state(weights), "", counting(weights, times)) == "one"


def test_the_cache_may_be_a_link_to_anything(weights: Path, folder: Path, tmp_path: Path) -> None:
    """Neither memory nor time beyond a bound, and nobody's file is overwritten."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    folder.mkdir()
    for target in (large, Path("/dev/zero"), folder):
        (folder / "checksums.json").symlink_to(target)
        assert remembered(file_state(weights), "", counting(weights, [])) == "one"
        (folder / "checksums.json").unlink()
    assert large.stat().st_size == 1 << 40


def test_nothing_is_remembered_where_changes_have_no_time(
    weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, ctime is when the file was created, and other content has the same."""
    monkeypatch.setattr(cache, "_NOTICED", False)
    assert remembered(file_state(weights), "", counting(weights, [])) == "one"
    assert not (folder / "checksums.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "\0"])
def test_a_damaged_cache_is_replaced(content: str, weights: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "checksums.json").write_text(content)
    assert remembered(file_state(weights), "", counting(weights, [])) == "one"
    assert [*json.loads((folder / "checksums.json").read_text()).values()] == ["one"]


def test_nothing_is_needed_to_work(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have homes that do not exist or cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path / "file" / "cache"))
    assert remembered(file_state(weights), "", counting(weights, [])) == "one"


def test_the_cache_does_not_grow_for_ever(weights: Path, folder: Path) -> None:
    for number in range(150):
        remembered(file_state(weights), str(number), lambda: "x")
    assert len(json.loads((folder / "checksums.json").read_text())) == 100
    times: list[str] = []
    remembered(file_state(weights), "149", counting(weights, times))
    remembered(file_state(weights), "0", counting(weights, times))
    assert len(times) == 1, "the newest was dropped, or the oldest was not"
