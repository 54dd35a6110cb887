"""Load test of the web API: concurrent requests, with every response and the memory checked.

    python benchmarks/web_load.py CKPT [--requests 500] [--clients 10]

It starts `dcris web` as a process of its own, whose memory is measured.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from dcris import Segmenter
from dcris.data.images import read_image
from dcris.errors import DcrisError
from dcris.inference.web.service import coco_results

_PHRASES = ("left circle", "the small red star", "second ring from the right", "blue square")


def test_images(count: int = 6) -> list[bytes]:
    """Return different JPEG images of different shapes."""
    made = []
    for number in range(count):
        source = np.random.default_rng(number)
        coarse = Image.fromarray(source.integers(0, 256, (9, 12, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((240 + 40 * number, 320), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def request_masks(address: str, data: bytes, phrases: Sequence[str]) -> Any:
    """Send one request to the API and return the response."""
    query = urlencode({"phrase": phrases, "threshold": 0.1}, doseq=True)
    request = urllib.request.Request(f"{address}/api/segment?{query}", data=data)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def resident(process: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(checkpoint: str, requests: int = 500, clients: int = 10) -> dict[str, float]:
    """Send requests to a new server.

    Returns:
        "answered", "right" (equal to Segmenter's), "seconds", "settled_mb" (memory after 50
        requests) and "growth" (of the memory since then).
    """
    segmenter = Segmenter.from_pretrained(checkpoint, device="cpu", precision="float32")
    cases = []
    for number, data in enumerate(test_images()):
        phrases = _PHRASES[: 1 + number % len(_PHRASES)]
        predictions = segmenter.predict(read_image(data), phrases, threshold=0.1)
        cases.append((data, phrases, json.loads(json.dumps(coco_results(predictions, "")))))
    words = [
        sys.executable,
        "-m",
        "dcris",
        "web",
        checkpoint,
        "--port",
        "0",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            memory: list[int] = []

            def one(number: int) -> bool:
                data, phrases, expected = cases[number % len(cases)]
                found = request_masks(address, data, phrases)
                memory.append(resident(server.pid))
                return found == expected

            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                right = list(pool.map(one, range(requests)))
            seconds = time.perf_counter() - start
        finally:
            server.terminate()
    settled = memory[min(49, requests - 1)]
    return {
        "answered": len(right),
        "right": sum(right),
        "seconds": seconds,
        "settled_mb": settled / 1e6,
        "growth": max(memory[49:], default=settled) / settled - 1,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=10)
    args = parser.parse_args()
    try:
        print(json.dumps(load(args.checkpoint, args.requests, args.clients), indent=2))
    except DcrisError as error:
        parser.error(str(error))
