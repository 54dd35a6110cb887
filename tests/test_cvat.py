"""CVAT's automatic annotation with cvat-sdk's own client and driver, against a stand-in for the
server: CVAT itself runs in containers only."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dcris import Segmenter
from dcris.data.importer import import_annotations
from dcris.data.masks import encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.inference.cvat import create
from tool_environments import packages

PHRASES = ["leftmost", "rightmost"]


@dataclass
class Cvat:
    """What the client asks of a server for one task with images."""

    images: list[Path]
    uploaded: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> Any:
        """The answers have the required fields of the API's schema."""
        user = {"url": f"{self.url}/api/users/1", "id": 1, "username": "ann", "first_name": "", "last_name": ""}
        attribute = {"id": 31, "name": "phrase", "mutable": False, "input_type": "text", "default_value": ""}
        label = {"id": 21, "name": "object", "attributes": [{**attribute, "values": [""]}], "sublabels": []}
        label |= {"type": "any", "color": "#fff", "task_id": 7, "parent_id": None, "has_parent": False}
        times = {"created_date": "2026-11-29T10:00:00Z", "updated_date": "2026-11-29T10:00:00Z"}
        sizes = [Image.open(path).size for path in self.images]
        frames = [
            {"width": width, "height": height, "name": path.name, "related_files": 0}
            for path, (width, height) in zip(self.images, sizes, strict=True)
        ]
        count = len(frames)
        data = {"chunk_size": 72, "size": count, "image_quality": 70, "start_frame": 0, "stop_frame": count - 1}
        data |= {
            "frame_filter": "",
            "frames": frames,
            "deleted_frames": [],
            "included_frames": None,
            "chunks_updated_date": "2026-11-29T10:00:00Z",
        }
        data |= {
            "storage_method": "cache",
            "storage": "local",
            "sorting_method": "lexicographical",
            "media_type": "image",
        }
        task = {
            "id": 7,
            "name": "cups",
            "mode": "annotation",
            "owner": user,
            "assignee": None,
            "project_id": None,
            **times,
        }
        task |= {
            "url": f"{self.url}/api/tasks/7",
            "bug_tracker": "",
            "overlap": 0,
            "segment_size": count,
            "status": "annotation",
        }
        task |= {
            "data_chunk_size": 72,
            "data_compressed_chunk_type": "imageset",
            "data_original_chunk_type": "imageset",
        }
        task |= {"size": count, "image_quality": 70, "data": 1, "dimension": "2d", "subset": "", "organization": None}
        task |= {
            "target_storage": None,
            "source_storage": None,
            "jobs": {"count": 1, "completed": 0, "validation": 0, "url": "x"},
        }
        task |= {"labels": {"url": f"{self.url}/api/labels?task_id=7"}, "guide_id": None, "validation_mode": None}
        task |= {
            "assignee_updated_date": None,
            "organization_id": None,
            "media_type": "image",
            "cloud_storage_id": None,
        }
        return {
            "/api/server/about": {
                "name": "CVAT",
                "description": "",
                "version": "2.80.0",
                "subtitle": "",
                "logo_url": "",
            },
            "/api/users/self": {**user, "is_staff": True, "groups": [], "has_analytics_access": True},
            "/api/tasks/7": task,
            "/api/tasks/7/data/meta": data,
            "/api/labels": {"count": 1, "next": None, "previous": None, "results": [label]},
        }[path]


def _handler(cvat: Cvat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for cookie in ("sessionid=x", "csrftoken=y"):
                self.send_header("Set-Cookie", cookie)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path.rstrip("/")
            cvat.asked.append(self.path)
            if path == "/api/tasks/7/data":
                assert parse_qs(urlsplit(self.path).query)["type"] == ["chunk"]
                packed = io.BytesIO()
                with zipfile.ZipFile(packed, "w") as archive:
                    for number, image in enumerate(cvat.images):
                        archive.write(image, f"{number:06d}{image.suffix}")
                self.reply(packed.getvalue(), "application/zip")
                return
            try:
                self.reply(json.dumps(cvat.answer(path)).encode(), "application/json")
            except KeyError:
                self.reply(b"{}", "application/json", 404)

        def do_POST(self) -> None:
            cvat.asked.append(f"POST {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.reply(b'{"key": "secret"}', "application/json")

        def do_PATCH(self) -> None:
            self.take()

        def do_PUT(self) -> None:
            self.take()

        def take(self) -> None:
            cvat.asked.append(f"{self.command} {self.path}")
            found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            cvat.uploaded = found
            empty = {"version": 1, "tags": [], "shapes": [], "tracks": []}
            self.reply(json.dumps(empty).encode(), "application/json")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    return Handler


@pytest.fixture
def cvat(tmp_path: Path) -> Iterator[Cvat]:
    images = []
    for number in (1, 2):
        image = Image.new("RGB", (112, 96), (200, 200, 200))
        ImageDraw.Draw(image).ellipse((8, 20, 40, 52), fill=(200, 30, 30))
        ImageDraw.Draw(image).rectangle((70, 30 + 10 * number, 100, 80), fill=(30, 30, 200))
        images.append(tmp_path / f"{number}.png")
        image.save(images[-1])
    found = Cvat(images)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def annotate(cvat: Cvat, folder: Path, *more: str) -> Any:
    """Run `cvat-cli` as documented; its packages are in an environment of their own."""
    code = f"import sys; sys.path.append({packages('cvat')!r}); from cvat_cli.__main__ import main; sys.exit(main())"
    words = ["--server-host", cvat.url, "--auth", "ann:secret", "task", "auto-annotate", "7"]
    words += ["--function-module", "dcris.inference.cvat", "-p", "model=str:tiny", "-p", "device=str:cpu"]
    words += ["-p", "precision=str:float32", "-p", f"phrases=str:{'; '.join(PHRASES)}", *more]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]} {cvat.asked}"
    return cvat.uploaded["shapes"]


@pytest.mark.slow
@pytest.mark.parametrize("polygons", [False, True])
def test_cvat_gets_the_masks_of_the_segmenter(polygons: bool, cvat: Cvat, tmp_path: Path) -> None:
    """And what CVAT would export of them is imported with the phrases."""
    shapes = annotate(cvat, tmp_path, *(["--conv-mask-to-poly"] if polygons else []))
    segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="float32")
    expected = [
        (frame, found)
        for frame, path in enumerate(cvat.images)
        for found in segmenter.predict(path, PHRASES)
        if found.mask.any()
    ]
    assert len(shapes) == len(expected) >= 2
    coco: dict[str, Any] = {"categories": [{"id": 1, "name": "object"}], "annotations": []}
    coco["images"] = [
        {"id": 1 + frame, "file_name": path.name, "width": 112, "height": 96} for frame, path in enumerate(cvat.images)
    ]
    for number, (shape, (frame, found)) in enumerate(zip(shapes, expected, strict=True), 1):
        assert (shape["frame"], shape["label_id"], shape["source"]) == (frame, 21, "auto")
        assert shape["type"] == ("polygon" if polygons else "mask")
        assert shape["attributes"] == [{"spec_id": 31, "value": found.phrase}]
        segmentation: Any = [shape["points"]] if polygons else encode_mask(_decoded(shape["points"]))
        coco["annotations"].append(
            {"id": number, "image_id": 1 + frame, "category_id": 1, "iscrowd": int(not polygons), "segmentation": segmentation,
             "attributes": {"phrase": shape["attributes"][0]["value"]}}
        )  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    import_annotations(tmp_path / "instances.json", tmp_path / "my.jsonl", strict=True)
    references = load_references(tmp_path / "my.jsonl", None).references
    for reference, (_, found) in zip(references, expected, strict=True):
        assert [each.text for each in reference.expressions] == [found.phrase]
        np.testing.assert_array_equal(union_mask(reference.segmentations, (96, 112)), found.mask)


def _decoded(points: list[float]) -> Any:
    """CVAT's run lengths in a box, by its description: first zeros, then ones, row by row."""
    *runs, left, top, right, bottom = (int(point) for point in points)
    values = [place % 2 for place, run in enumerate(runs) for _ in range(run)]
    mask = np.zeros((96, 112), np.uint8)
    mask[top : bottom + 1, left : right + 1] = np.reshape(values, (bottom + 1 - top, right + 1 - left))
    return mask


def test_phrases_are_required() -> None:
    with pytest.raises(DcrisError, match="there is no phrase"):
        create(model="tiny", phrases=" ; \n")
