"""`dcris data fetch`: complete downloads, each file once and whole, and an error with advice for
each failure.
"""

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcris.cli import main
from dcris.data import coco, download_images
from dcris.data.check import check_dataset
from dcris.data.coco import IMAGE_FOLDER
from dcris.data.readers.load import load_references
from hub import Hub
from image_server import ImageServer
from layouts import hub_files
from runs import leftovers

SPLITS = ("train", "val", "testA", "testB")
COUNT = 16
"""Number of images, four in each split; each has two references."""


def _name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def _size(number: int) -> tuple[int, int]:
    return 20 + number, 40


@cache
def _jpeg(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _annotations() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    references, annotations = [], []
    for number in range(2 * COUNT):
        image_id = number // 2 + 1
        split = SPLITS[(image_id - 1) * len(SPLITS) // COUNT]
        outline = [2.5, 3.0, 12.0 + number % 2, 3.0, 12.0, 9.25, 2.0, 9.0]
        annotations.append({"id": 900 + number, "image_id": image_id, "category_id": 1, "segmentation": [outline]})
        sentences = [
            {"sent_id": 2 * number + place, "sent": text, "raw": text.upper(), "tokens": text.split()}
            for place, text in enumerate(["left one", f"man number {number}"])
        ]
        references.append(
            {
                "ref_id": number,
                "ann_id": 900 + number,
                "image_id": image_id,
                "category_id": 1,
                "split": split,
                "sent_ids": [2 * number, 2 * number + 1],
                "sentences": sentences,
            }
        )
    images = [
        {"id": number, "file_name": _name(number), "height": _size(number)[0], "width": _size(number)[1]}
        for number in range(1, COUNT + 1)
    ]
    return references, {"images": images, "annotations": annotations}


@pytest.fixture
def image_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    """COCO's server, with short pauses between attempts."""
    monkeypatch.setattr(download_images, "_PAUSES", (0.01, 0.02, 0.03, 0.04))
    with ImageServer() as server:
        for number in range(1, COUNT + 1):
            server.content[f"/train2014/{_name(number)}"] = _jpeg(_size(number), number)
        monkeypatch.setattr(coco, "IMAGE_SERVER", f"{server.url}/{{}}")
        yield server


@pytest.fixture
def served(hub: Hub, image_server: ImageServer) -> ImageServer:
    """The complete data set: annotations on the Hub, images on COCO's server."""
    hub.push("datasets/jxu124/refcoco", hub_files(*_annotations()))
    return image_server


def _fetch(root: Path, *words: object) -> int:
    return main(["data", "fetch", "refcoco", "--out", str(root), *map(str, words)])


def _files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / IMAGE_FOLDER).iterdir()}


def _refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return the error message, the last line, of a command that failed with exit code 2."""
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert code == 2, complaint
    assert complaint.startswith("dcris: ")
    return complaint


# ---- without failures ----------------------------------------------------------------------------


def test_the_whole_data_set_is_downloaded(
    served: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command downloads RefCOCO in the layout of the release."""
    monkeypatch.setattr("dcris.utils.streams._SECONDS_BETWEEN_LINES", 0)
    root = tmp_path / "data"
    assert _fetch(root) == 0
    printed = capsys.readouterr()
    assert f"16 images from {served.url}/train2014, about 2.6 MB" in printed.err
    assert "16 of 16 images" in printed.err  # in a log, where a terminal has a bar
    assert printed.out == f"{root}: refcoco (unc) is complete; next: dcris data check {root} --dataset refcoco\n"
    assert _files(root) == {path.rpartition("/")[2]: content for path, content in served.content.items()}
    references, instances = _annotations()
    with (root / "refcoco/refs(unc).p").open("rb") as file:
        written = {record["ref_id"]: record for record in pickle.load(file)}
    for record in references:
        fields = written[record["ref_id"]]
        assert fields.pop("file_name").endswith(f"_{record['ann_id']}.jpg")
        assert fields == record
    content = json.loads((root / "refcoco/instances.json").read_text())
    assert sorted(content["images"], key=lambda image: image["id"]) == instances["images"]
    assert sorted(content["annotations"], key=lambda annotation: annotation["id"]) == instances["annotations"]
    assert len(content["info"]["version"]) == 40
    assert main(["data", "check", str(root), "--dataset", "refcoco", "--deep"]) == 0
    assert not leftovers(root)


def test_requests_are_few_and_identified(served: ImageServer, tmp_path: Path) -> None:
    """Requests name the program, are never repeated, and use few connections."""
    served.delay = 0.03
    assert _fetch(tmp_path, "--connections", 3) == 0
    assert 1 <= served.most_open <= 3
    assert sorted(served.asked_for()) == [_name(number) for number in range(1, COUNT + 1)]
    assert all(agent.startswith("dcris/") for _, agent, _ in served.requests)
    assert _fetch(tmp_path) == 0
    assert len(served.requests) == COUNT


def test_only_the_chosen_splits_and_later_others(served: ImageServer, hub: Hub, tmp_path: Path) -> None:
    """Evaluation needs only the test splits, one gigabyte of three; others are added later."""
    assert _fetch(tmp_path, "--splits", "val", "testA") == 0
    assert list(load_references(tmp_path, "refcoco").splits()) == ["val", "testA"]
    assert sorted(_files(tmp_path)) == [_name(number) for number in range(5, 13)]
    assert not any("train" in name for name in hub.bodies())
    assert check_dataset(tmp_path, "refcoco").problem_count == 0
    assert _fetch(tmp_path, "--splits", "train") == 0
    assert list(load_references(tmp_path, "refcoco").splits()) == ["train", "val", "testA"]
    assert check_dataset(tmp_path, "refcoco").problem_count == 0
    assert len(served.requests) == 12
    before = (tmp_path / "refcoco/refs(unc).p").stat().st_mtime_ns
    assert _fetch(tmp_path, "--splits", "val") == 0
    assert (tmp_path / "refcoco/refs(unc).p").stat().st_mtime_ns == before


def test_images_for_existing_annotations(
    served: ImageServer, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Existing annotations of the release are kept, and the Hub is not used."""
    assert _fetch(tmp_path / "first") == 0
    shutil.copytree(tmp_path / "first/refcoco", tmp_path / "data/refcoco")
    hub.stop()
    capsys.readouterr()
    assert _fetch(tmp_path / "data") == 0
    assert "the annotations exist (train, val, testA, testB)" in capsys.readouterr().err
    assert _files(tmp_path / "data") == _files(tmp_path / "first")


def test_an_image_of_another_size_is_downloaded_again(served: ImageServer, tmp_path: Path) -> None:
    """A resized or truncated copy would silently harm training."""
    assert _fetch(tmp_path) == 0
    folder = tmp_path / IMAGE_FOLDER
    (folder / _name(1)).write_bytes(b"")
    (folder / _name(2)).write_bytes(_jpeg((10, 20), 0))
    assert _fetch(tmp_path) == 0
    assert served.asked_for()[COUNT:] in ([_name(1), _name(2)], [_name(2), _name(1)])
    assert _files(tmp_path) == {path.rpartition("/")[2]: content for path, content in served.content.items()}


def test_missing_images_are_added_to_an_existing_train2017_folder(served: ImageServer, tmp_path: Path) -> None:
    """Many people have COCO's release of 2017; only one folder of images is read."""
    (tmp_path / "train2017").mkdir()
    for number in range(1, 15):
        (tmp_path / f"train2017/{number:012d}.jpg").write_bytes(served.content[f"/train2014/{_name(number)}"])
    assert _fetch(tmp_path) == 0
    assert sorted(served.asked_for()) == [_name(15), _name(16)]
    assert (tmp_path / "train2017/000000000016.jpg").is_file()
    assert check_dataset(tmp_path, "refcoco").problem_count == 0


# ---- the network ---------------------------------------------------------------------------------


def test_a_busy_server_and_broken_connections_are_tried_again(served: ImageServer, tmp_path: Path) -> None:
    """Some of twenty thousand requests fail and are repeated."""
    served.faults[f"/train2014/{_name(1)}"] = [(503, {}), (429, {"Retry-After": "nonsense"}), (500, {})]
    served.faults[f"/train2014/{_name(2)}"] = [(0, {}), (0, {"Content-Length": "99999"})]
    assert _fetch(tmp_path) == 0
    assert (served.asked_for().count(_name(1)), served.asked_for().count(_name(2))) == (4, 3)
    assert check_dataset(tmp_path, "refcoco", deep=True).problem_count == 0


def test_retry_after_is_respected(served: ImageServer, tmp_path: Path) -> None:
    """Servers block clients that ignore Retry-After."""
    served.faults[f"/train2014/{_name(1)}"] = [(503, {"Retry-After": "1"})]
    assert _fetch(tmp_path) == 0
    first, second = (moment for path, _, moment in served.requests if path.endswith(_name(1)))
    assert second - first >= 0.9


def test_retry_after_is_parsed_and_capped() -> None:
    """Retry-After is a number or a date. Long times are capped, malformed ones ignored."""
    assert 98 < download_images._seconds(formatdate(time.time() + 100, usegmt=True)) <= 100
    assert download_images._seconds("86400") == download_images._seconds(formatdate(time.time() + 86400)) == 120
    assert download_images._seconds("9" * 400) == 120
    for text in (None, "", "-5", "soon", "nan", "1e3", "\u00b2", formatdate(0)):
        assert download_images._seconds(text) == 0


def test_single_failures_are_named_at_the_end(
    served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other images are not affected, and the same command then requests only the missing ones."""
    content = dict(served.content)
    del served.content[f"/train2014/{_name(3)}"]
    served.content[f"/train2014/{_name(9)}"] = _jpeg((7, 9), 0)
    served.content[f"/train2014/{_name(11)}"] = b"<html>please log in</html>"
    complaint = _refused(capsys, _fetch(tmp_path))
    assert "3 of 16 images could not be obtained: " in complaint
    assert f"{_name(3)} (HTTP 404 Not Found)" in complaint
    assert f"{_name(9)} (the received image is 9x7 pixels, but the annotations are for 40x29)" in complaint
    assert f"{_name(11)} (the received file is not a whole image" in complaint
    assert str(tmp_path / IMAGE_FOLDER) in complaint
    assert len(_files(tmp_path)) == COUNT - 3
    served.content = content
    assert _fetch(tmp_path) == 0
    assert sorted(served.asked_for()[COUNT:]) == [_name(number) for number in (3, 9, 11)]
    assert check_dataset(tmp_path, "refcoco").problem_count == 0


def test_a_server_that_delivers_nothing_stops_the_download(
    served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a wrong address, twenty thousand requests would be useless."""
    complaint = _refused(capsys, _fetch(tmp_path, "--photographs", f"{served.url}/train", "--connections", 1))
    assert "10 images in a row could not be downloaded" in complaint
    assert "HTTP 404" in complaint
    assert len(served.requests) <= 12
    served.stop()
    complaint = _refused(capsys, _fetch(tmp_path))
    assert "refused" in complaint
    assert "check the address and the network" in complaint


def test_a_mirror_of_train2017(served: ImageServer, tmp_path: Path) -> None:
    """Mirrors of the release of 2017 have the same images under shorter names."""
    for number in range(1, COUNT + 1):
        served.content[f"/coco/train2017/{number:012d}.jpg"] = served.content.pop(f"/train2014/{_name(number)}")
    assert _fetch(tmp_path, "--photographs", f"{served.url}/coco/train2017/") == 0
    assert sorted(_files(tmp_path)) == [_name(number) for number in range(1, COUNT + 1)]


def test_responses_without_length_or_end(
    served: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mirror may send no Content-Length; an endless response must not fill the memory."""
    served.faults[f"/train2014/{_name(1)}"] = [(200, {"Content-Length": ""})]
    served.content[f"/train2014/{_name(2)}"] += bytes(70_000)
    monkeypatch.setattr(download_images, "_MAX_BYTES", 60_000)
    complaint = _refused(capsys, _fetch(tmp_path))
    assert (
        f"1 of 16 images could not be obtained: {_name(2)} (the received file has more than 60,000 bytes)" in complaint
    )
    assert _name(1) in _files(tmp_path)


def test_half_an_image_is_not_kept(served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a response has no length, a broken connection looks like its end: half an image was
    written, counted as complete, and stopped the training later.
    """
    served.faults[f"/train2014/{_name(1)}"] = [(0, {"Content-Length": ""})]
    complaint = _refused(capsys, _fetch(tmp_path))
    assert f"1 of 16 images could not be obtained: {_name(1)} (the received file is not a whole image" in complaint
    assert _fetch(tmp_path) == 0
    assert check_dataset(tmp_path, "refcoco", deep=True).problem_count == 0


def test_ctrl_c_leaves_whole_files_and_the_same_command_continues(
    served: ImageServer, hub: Hub, tmp_path: Path
) -> None:
    """A download of three gigabytes may be interrupted many times."""
    served.delay = 0.15
    command = [sys.executable, "-m", "dcris", "data", "fetch", "refcoco", "--out", str(tmp_path / "data")]
    command += ["--photographs", f"{served.url}/train2014", "--connections", "2"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "data" / IMAGE_FOLDER
    deadline = time.monotonic() + 60
    while not (folder.is_dir() and len(list(folder.glob("COCO*"))) >= 4):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert printed.splitlines()[-1] == "dcris: interrupted"
    arrived = _files(tmp_path / "data")
    assert 4 <= len(arrived) < COUNT
    assert all(content == served.content[f"/train2014/{name}"] for name, content in arrived.items())
    assert not leftovers(tmp_path / "data")
    served.delay, asked = 0.0, len(served.requests)
    assert _fetch(tmp_path / "data") == 0
    assert len(served.requests) - asked == COUNT - len(arrived)


# ---- the disk ------------------------------------------------------------------------------------


def test_lack_of_space_is_reported_before_the_download(
    served: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check comes before the download."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    complaint = _refused(capsys, _fetch(tmp_path))
    assert "the images need about 2.6 MB, but" in complaint
    assert "1.0 MB free" in complaint
    assert served.requests == []


def test_a_disk_that_fills_during_the_download(
    served: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other programs may fill the disk meanwhile. Files that are written are whole and are kept."""
    write_bytes, written = Path.write_bytes, []

    def fill(path: Path, content: bytes) -> int:
        if "COCO" in path.name:
            written.append(path)
            if len(written) > 5:
                write_bytes(path, content[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert "No space left on device; free disk space" in _refused(capsys, _fetch(tmp_path, "--connections", 1))
    assert len(written) < COUNT
    monkeypatch.undo()
    assert len(_files(tmp_path)) == 5
    assert all(content == served.content[f"/train2014/{name}"] for name, content in _files(tmp_path).items())
    assert not leftovers(tmp_path / "images")


# ---- a folder, a zip -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "train2014/", "train2017/"])
def test_from_a_folder(served: ImageServer, tmp_path: Path, inner: str) -> None:
    """COCO may exist on a local disk, in either release."""
    for path, content in served.content.items():
        name = path.rpartition("_")[2] if inner == "train2017/" else path.rpartition("/")[2]
        (tmp_path / "coco" / inner).mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / inner / name).write_bytes(content)
    assert _fetch(tmp_path / "data", "--photographs", tmp_path / "coco") == 0
    assert _files(tmp_path / "data") == {path.rpartition("/")[2]: content for path, content in served.content.items()}
    assert served.requests == []


def test_from_a_folder_that_lacks_many(served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images that the folder has are copied."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / _name(COUNT)).write_bytes(served.content[f"/train2014/{_name(COUNT)}"])
    complaint = _refused(capsys, _fetch(tmp_path / "data", "--photographs", tmp_path / "coco"))
    assert "15 of 16 images could not be obtained" in complaint
    assert f"(it is not in {tmp_path / 'coco'})" in complaint
    assert "and 10 more" in complaint
    assert list(_files(tmp_path / "data")) == [_name(COUNT)]


def test_from_a_zip_with_any_names(served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train2014.zip of COCO; member names that lead out of the folder write nothing elsewhere."""
    archive = tmp_path / "train2014.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train2014/", b"")
        for path, content in served.content.items():
            folder = "../../../" if path.endswith(_name(1)) else "/etc/" if path.endswith(_name(2)) else "train2014/"
            file.writestr(folder + path.rpartition("/")[2], content)
        file.writestr("../../evil.sh", b"echo")
    root = tmp_path / "a/b/c"
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert _fetch(root, "--photographs", archive) == 0
    assert _files(root) == {path.rpartition("/")[2]: content for path, content in served.content.items()}
    new = {path for path in tmp_path.rglob("*") if "cache" not in path.parts} - before
    assert all(path.is_relative_to(tmp_path / "a") for path in new)
    assert served.requests == []
    assert not list(tmp_path.rglob("evil*"))


def test_from_a_zip_that_is_damaged(served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each member of a zip file has a checksum."""
    archive = tmp_path / "train2014.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path, content in served.content.items():
            file.writestr(path[1:], content)
    data = bytearray(archive.read_bytes())
    data[data.index(served.content[f"/train2014/{_name(4)}"]) + 500] ^= 1
    archive.write_bytes(data)
    complaint = _refused(capsys, _fetch(tmp_path / "data", "--photographs", archive))
    assert f"1 of 16 images could not be obtained: {_name(4)} (cannot read train2014/{_name(4)}" in complaint
    assert len(_files(tmp_path / "data")) == COUNT - 1
    archive.write_bytes(data[:-30])
    complaint = _refused(capsys, _fetch(tmp_path / "other", "--photographs", archive))
    assert "not a zip file" in complaint
    assert not (tmp_path / "other").exists()


def test_other_things_than_images_in_a_folder_or_zip(
    served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe would block for ever; a zip member may decompress to any size. Each is named, and the
    others are copied.
    """
    folder, archive = tmp_path / "coco", tmp_path / "coco.zip"
    folder.mkdir()
    os.mkfifo(folder / _name(1))
    (folder / _name(2)).mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open(_name(1), "w", force_zip64=True) as member:
            for _ in range(60):
                member.write(bytes(1_000_000))
        for path, content in served.content.items():
            if not path.endswith((_name(1), _name(2))):
                (folder / path.rpartition("/")[2]).write_bytes(content)
                file.writestr(path[1:], content)
    complaint = _refused(capsys, _fetch(tmp_path / "a", "--photographs", folder))
    assert "2 of 16 images could not be obtained" in complaint
    assert f"cannot read {folder / _name(1)}: it is a pipe" in complaint
    assert f"cannot read {folder / _name(2)}: it is a folder" in complaint
    complaint = _refused(capsys, _fetch(tmp_path / "b", "--photographs", archive))
    assert f"{_name(1)} has more than 50,000,000 bytes" in complaint
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe.zip")
    assert "it is a pipe" in _refused(capsys, _fetch(tmp_path / "c", "--photographs", tmp_path / "pipe.zip"))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--splits", "test"), "refcoco has no split 'test'; choose from train, val, testA, testB"),
        (("--photographs", "/nowhere/train2014"), "/nowhere/train2014 is neither a folder nor a zip file of images"),
    ],
)
def test_wrong_arguments_cost_no_download(
    served: ImageServer,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    sentence: str,
) -> None:
    assert sentence in _refused(capsys, _fetch(tmp_path / "data", *words))
    assert main(["data", "fetch", "refclef", "--out", str(tmp_path / "data")]) == 2
    assert "choose from refcoco, refcoco+, refcocog, grefcoco, refsegrs, refcoco-m, gseval\n" in capsys.readouterr().err
    assert hub.requests == []
    assert not (tmp_path / "data").exists()


def test_other_annotations_are_never_overwritten(
    served: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The release's instances.json is used by several partitions, and is hard to obtain."""
    assert _fetch(tmp_path, "--splits", "val") == 0
    own = tmp_path / "refcoco/refs(google).p"
    own.write_bytes((tmp_path / "refcoco/refs(unc).p").read_bytes())
    assert "contains refs(google).p, which needs the instances.json there" in _refused(capsys, _fetch(tmp_path))
    own.unlink()
    records = pickle.loads((tmp_path / "refcoco/refs(unc).p").read_bytes())
    records[0]["split"] = "mini"
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(records))
    assert "splits that are not on the Hub (mini) and would be lost" in _refused(capsys, _fetch(tmp_path))


def test_annotations_are_checked_before_they_are_written(
    image_server: ImageServer, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the repository changes or contains a split twice, nothing is written."""
    references, instances = _annotations()
    files = hub_files(references, instances)
    twice = {name.replace("0123", "4567"): content for name, content in files.items() if "validation" in name}
    for number, (content, sentence) in enumerate(
        [
            ({**files, **twice}, "reference 8 occurs twice"),
            (dict.fromkeys(files, b"PAR1"), "is not a whole Parquet file"),
            ({name: files[name] for name in files if "testB" not in name}, "no longer has the split testB"),
        ]
    ):
        hub.push("datasets/jxu124/refcoco", content)
        assert sentence in _refused(capsys, _fetch(tmp_path / str(number)))
        assert not (tmp_path / str(number)).exists()


def test_without_pyarrow_nothing_is_downloaded(
    served: ImageServer, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert 'pip install "pyarrow>=14.0.1"' in _refused(capsys, _fetch(tmp_path))
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached(
    served: ImageServer, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.stop()
    assert "jxu124/refcoco" in _refused(capsys, _fetch(tmp_path))


# ---- real references -----------------------------------------------------------------------------


@pytest.mark.slow
def test_real_references_and_images(
    refer_root: Path, hub: Hub, image_server: ImageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real masks, text and images are unchanged after the download."""
    with (refer_root / "cocomini/refs(templated).p").open("rb") as file:
        records = pickle.load(file)
    instances = json.loads((refer_root / "cocomini/instances.json").read_text())
    for record in records:
        if record["image_id"] % 10 == 0:  # by image: an image in two splits is a leak
            record["split"] = "testB"  # which this data set does not have
    for image in instances["images"]:
        path = refer_root / IMAGE_FOLDER / image["file_name"]
        if path.exists():
            image["file_name"] = f"COCO_train2014_{image['file_name']}"
            image_server.content[f"/train2014/{image['file_name']}"] = path.read_bytes()
    hub.push("datasets/jxu124/refcoco", hub_files(records, instances))
    assert _fetch(tmp_path) == 0
    assert main(["data", "check", str(tmp_path), "--dataset", "refcoco", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["problem_count"] == 0
    splits = {record["ref_id"]: record["split"] for record in records}
    expected = {reference.ref_id: reference for reference in load_references(refer_root, "cocomini").references}
    table = load_references(tmp_path, "refcoco")
    assert len(table.references) == len(expected)
    for reference in table.references:
        truth = expected[reference.ref_id]
        for attribute in ("ann_ids", "image_id", "image_size", "category", "segmentations", "expressions"):
            assert getattr(reference, attribute) == getattr(truth, attribute)
        assert reference.split == splits[reference.ref_id]
        assert reference.image_path.read_bytes() == truth.image_path.read_bytes()
