"""A full disk, a killed process or a wrong path never leaves half a result, nor deletes the old
one."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

from dcris.cli import main
from dcris.errors import DcrisError
from dcris.utils import files
from dcris.utils.files import (
    lock_folder,
    make_directory,
    open_regular,
    read_bytes,
    read_json,
    read_json_lines,
    write_directory,
    write_file,
    write_json,
)
from marks import slow_except
from runs import leftovers


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(path: Path) -> None:
    path.write_bytes(b"half")
    full_disk()


def in_folder(folder: Path) -> None:
    (folder / "new").write_bytes(b"new")


def half_a_folder(folder: Path) -> None:
    in_folder(folder)
    full_disk()


@pytest.mark.parametrize("content", ["täxt", b"bytes", lambda path: path.write_bytes(b"by a function")])
def test_write_file(tmp_path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Its folder is created if missing, and its permissions are those of the umask, not of a
    temporary file."""
    path = tmp_path / "a" / "b" / "file.txt"
    for _ in range(2):
        write_file(path, content)
    assert len(path.read_bytes()) >= 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # of umask 022
    assert os.listdir(path.parent) == ["file.txt"]  # noqa: PTH208


@pytest.mark.parametrize("when", ["the content", "fsync", "the rename"])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The old content is unchanged."""
    path = tmp_path / "result.json"
    write_file(path, "old")
    if when == "fsync":
        monkeypatch.setattr(files.os, "fsync", full_disk)
    if when == "the rename":
        monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(DcrisError, match=r"cannot write .*result\.json: No space left on device; free disk space"):
        write_file(path, half if when == "the content" else "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writer_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """Ctrl-C during a write, or a bug in the writing function."""

    def stopped(path: Path) -> None:
        raise error

    for write in (write_file, write_directory):
        with pytest.raises(error):
            write(tmp_path / "target", stopped)
    assert not list(tmp_path.iterdir())


def test_lock_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's name in the lock file is information only; failing to write it must not hide the
    real error."""
    monkeypatch.setattr(files.socket, "gethostname", full_disk)
    with lock_folder(tmp_path):
        assert (tmp_path / "lock").read_text() == ""
    assert not list(tmp_path.iterdir())  # the lock file is removed with its owner


def test_lock_with_changing_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network drives report another inode each time; locking must not retry forever."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with lock_folder(tmp_path):
        assert "process" in (tmp_path / "lock").read_text()


def test_unwritable_paths(tmp_path: Path) -> None:
    """A file instead of a folder, a folder instead of a file, and a name that is too long: one
    message each, which does not send anybody to look for disk space."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for write in (
        lambda: write_file(tmp_path / "file" / "a.txt", "x"),
        lambda: write_file(tmp_path / "folder", "x"),
        lambda: write_file(tmp_path / ("n" * 300), "x"),
        lambda: write_directory(tmp_path / "file" / "a", in_folder),
        lambda: make_directory(tmp_path / "file"),
        lambda: make_directory(tmp_path / "file" / "a"),
    ):
        with pytest.raises(DcrisError, match=r"cannot write .*; choose another (path|name)"):
            write()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]  # noqa: PTH208
    assert not leftovers(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    """A folder of another user."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o500)
    with pytest.raises(DcrisError, match=r"cannot write .*Permission denied"):
        write_file(folder / "a.txt", "x")


def test_a_run_whose_current_folder_was_deleted_writes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone tidies the folder that a training was started from; its checkpoints must not fail."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    write_directory(tmp_path / "checkpoint", lambda folder: (folder / "a").touch())
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "checkpoint/a").is_file()
    with pytest.raises(DcrisError, match="current folder or above it"):
        write_directory(tmp_path, lambda folder: None)


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    """A checkpoint must not mix files of two steps."""
    path = tmp_path / "checkpoint"
    write_directory(path, lambda folder: [(folder / name).write_text("old") for name in ("one", "two")] and None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    write_directory(path, in_folder)
    assert [item.name for item in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("when", ["the content", "fsync", "the rename"])
def test_full_disk_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The old directory is unchanged."""
    path = tmp_path / "checkpoint"
    write_directory(path, lambda folder: (folder / "old").write_text("old") and None)
    if when == "fsync":
        monkeypatch.setattr(files.os, "fsync", full_disk)
    if when == "the rename":
        rename = Path.rename

        def refused(self: Path, target: Path) -> Path:
            # The old directory is renamed, then renaming the new one fails.
            return full_disk() if (self / "new").exists() else rename(self, target)

        monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DcrisError, match=r"cannot write .*checkpoint: No space left on device"):
        write_directory(path, half_a_folder if when == "the content" else in_folder)
    monkeypatch.undo()
    assert [item.name for item in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_json(tmp_path: Path) -> None:
    """Other programs could not read it."""
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"miou": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_round_trip(tmp_path: Path) -> None:
    """Through write_json and read_json, or another reader."""
    path, value = tmp_path / "a.json", {"phrase": "größer", "box": [1, 2.5, None]}
    write_json(path, value)
    assert read_json(path, "the file") == value == json.loads(path.read_text())


@pytest.mark.parametrize(
    "content", [b"", b'{"a": [1, 2', b"[" * 100_000, b'{"a": 1, "b": {"c": 1, "c": 1}}', b"9" * 5000]
)
def test_invalid_json_errors(tmp_path: Path, content: bytes) -> None:
    """Truncated, binary, or made to exhaust the reader."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DcrisError, match=r"the thing, .*a\.json, is not valid JSON"):
        read_json(path, "the thing")
    with pytest.raises(DcrisError, match="the thing is missing"):
        read_json(tmp_path / "b.json", "the thing")
    with pytest.raises(DcrisError, match="cannot read the thing"):
        read_json(tmp_path, "the thing")


def test_json_that_is_something_else(tmp_path: Path) -> None:
    """Notepad and PowerShell write a byte order mark; `>` of PowerShell 5 writes UTF-16, which the
    message names, as it does a zip file (exports, spreadsheets) and XML (exports, error pages)."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}\r\n')
    assert read_json(path, "the thing") == {"a": "ä"}
    for encoding in ("utf-16", "utf-16-le"):
        path.write_text('{"a": 1}', encoding)
        with pytest.raises(DcrisError, match=r"UTF-16 text.*save it as UTF-8"):
            read_json(path, "the thing")
    path.write_bytes(b"PK\3\4\x14\0\0\0")
    with pytest.raises(DcrisError, match=r"zip file.*unpack an archive first, and save a spreadsheet as CSV"):
        read_json(path, "the thing")
    with pytest.raises(DcrisError, match="zip file"):
        next(read_json_lines(path))
    path.write_text('\n<?xml version="1.0"?><annotations/>')
    with pytest.raises(DcrisError, match=r"is XML or HTML, not JSON; export or download it again in a format"):
        read_json(path, "the thing")
    path.write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(DcrisError, match=r"not UTF-8 text \(from byte 8 on\)"):
        read_json(path, "the thing")


@pytest.mark.parametrize("unit", slow_except(["[],", "{},", '{"":0},', "[[[]]],"], "{},"))
def test_dense_json_is_refused(tmp_path: Path, unit: str) -> None:
    """30 MB of empty lists take 0.7 GB in memory, and 1 GB is a plausible file size."""
    (tmp_path / "a.json").write_text(f"[{unit * 1_200_000}0]")
    with pytest.raises(DcrisError, match=r"lists and objects in .* are too many"):
        read_json(tmp_path / "a.json", "the thing")
    (tmp_path / "a.jsonl").write_text(f"[{unit * 20_000}0]\n" * 60)
    with pytest.raises(DcrisError, match=r"lists and objects in .* are too many"):
        for _ in read_json_lines(tmp_path / "a.jsonl"):
            pass


@pytest.mark.slow
def test_polygons_of_many_points_are_accepted(tmp_path: Path) -> None:
    """Annotation tools write polygons as lists of points, `[[12, 345], ...]`: millions of lists of
    a few characters."""
    (tmp_path / "a.json").write_text(f'{{"points": [{"[12,345]," * 1_200_000}[0,0]]}}')
    assert len(read_json(tmp_path / "a.json", "the thing")["points"]) == 1_200_001


def irregular(folder: Path) -> dict[str, Path]:
    """A pipe, a link, a link to a pipe and a device."""
    os.mkfifo(folder / "pipe.json")
    (folder / "file.json").write_text("{}")
    (folder / "link.json").symlink_to("file.json")
    (folder / "link-to-pipe.json").symlink_to("pipe.json")
    return {name: folder / name for name in ("pipe.json", "link-to-pipe.json")} | {"device": Path("/dev/zero")}


@pytest.mark.timeout(10)
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    """A pipe without a writer would block forever, and /dev/zero would fill the memory."""
    for path in irregular(tmp_path).values():
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(
            DcrisError, match=r"cannot read the settings, .*: it is a (pipe|device), not a regular file"
        ):
            read_json(path, "the settings")
    with pytest.raises(DcrisError, match="it is a folder, not a file"):
        read_json(tmp_path, "the settings")
    assert read_json(tmp_path / "link.json", "the settings") == {}


def test_too_large_file_is_refused(tmp_path: Path) -> None:
    """The size is limited before the file is in memory, also if it grows while it is read."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than"):
        read_bytes(path, 4)
    status = Path("/proc/self/status")  # reports size 0
    if status.exists():
        with pytest.raises(OSError, match="larger than"):
            read_bytes(status, 4)


def test_byte_order_marks(tmp_path: Path) -> None:
    """PowerShell and Notepad write a byte order mark."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", "the settings") == {"a": 1}


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """Replacing a named pipe, a link or a device (/dev/null as root) would break it for its other
    users."""
    for name, path in irregular(tmp_path).items():
        if name == "device":
            continue  # the real one is not used
        before = path.lstat()
        with pytest.raises(DcrisError, match="with this name exists"):
            write_file(path, "x")
        with pytest.raises(DcrisError, match="with this name exists"):
            write_directory(path, in_folder)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(DcrisError, match="a link with this name exists"):
        write_file(tmp_path / "link.json", "x")
    assert (tmp_path / "file.json").read_text() == "{}"


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_umask(tmp_path: Path, umask: int) -> None:
    """With a umask of 077, results are private."""
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.txt", "x")
        write_directory(tmp_path / "folder", in_folder)
    finally:
        os.umask(before)
    for path, mode in (("a.txt", 0o666), ("folder", 0o777), ("folder/new", 0o666)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode & ~umask


def test_longest_file_name(tmp_path: Path) -> None:
    """File systems allow 255 bytes; the temporary name must not be longer."""
    for name in ("n" * 250 + ".json", "ü" * 125 + ".json", "a." + "e" * 250):
        write_file(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_without_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In containers, a user may have no entry in passwd, where Path.expanduser and huggingface_hub
    fail."""

    def unknown(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    from huggingface_hub import constants

    Image.new("RGB", (9, 9)).save(tmp_path / "x.jpg")
    words = ["predict", "detris-b-refcoco", str(tmp_path / "x.jpg"), "-e", "a", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.delenv("DCRIS_CACHE", raising=False)
    assert main(words) == 2
    error_text = capsys.readouterr().err
    assert "DCRIS_CACHE" in error_text
    assert "HF_HOME" in error_text
    monkeypatch.setattr(Path, "expanduser", lambda path: path)
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path / "cache"))
    assert main(words) == 2
    assert "HF_HOME" in capsys.readouterr().err  # and no folder named ~ is created
    assert main(["data", "fetch", "refcoco", "--out", str(tmp_path), "--photographs", "~/train2014"]) == 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("evaluate tiny --data my.jsonl --out my.jsonl", "cannot write my.jsonl: this command reads that file"),
        ("evaluate tiny --data my.jsonl --report sub/../my.jsonl", "my.jsonl: this command reads that file"),
        ("evaluate m.safetensors --data my.jsonl --out m.safetensors", "m.safetensors: this command reads that file"),
        ("evaluate tiny --data my.jsonl --out new --report ./new", "cannot write new: another result is to have this"),
        ("evaluate tiny --data my.jsonl --all --out my.jsonl", "my.jsonl: this command reads that file"),
        ("evaluate tiny --data my.jsonl --out my.jsonl/new.json", "my.jsonl/new.json: Not a directory"),
        ("evaluate tiny --data my.jsonl --report sub", "cannot write sub: a folder with this name exists"),
        ("score a.jsonl --data my.jsonl --out a.jsonl", "cannot write a.jsonl: this command reads that file"),
        ("compare a.jsonl tiny --data my.jsonl --out a.jsonl", "cannot write a.jsonl: this command reads that file"),
        ("table r.json --out r.json", "cannot write r.json: this command reads that file"),
        ("bench --quick --json sub", "cannot write sub: a folder with this name exists"),
    ],
)
def test_a_result_replaces_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, sentence: str
) -> None:
    """It is refused before anything is read: these files could not be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("my.jsonl", "m.safetensors", "a.jsonl", "r.json"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(command.split()) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert {file.read_text() for file in before if file.is_file()} == {"mine"}
