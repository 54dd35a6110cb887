"""How the web page's API stands a crowd: requests from several clients at once, each answer compared, memory watched.

    python benchmarks/web_load.py CKPT [--requests 500] [--clients 10]

It starts `dcris web` as its own process, so that the memory is the server's alone.
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
from dcris.inference.web.service import coco_results

_PHRASES = ("left circle", "the small red star", "second ring from the right", "blue square")


def pictures(count: int = 6) -> list[bytes]:
    """Different photographs of different shapes."""
    made = []
    for number in range(count):
        source = np.random.default_rng(number)
        coarse = Image.fromarray(source.integers(0, 256, (9, 12, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((240 + 40 * number, 320), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def ask(address: str, data: bytes, phrases: Sequence[str]) -> Any:
    """One request to the API."""
    query = urlencode({"phrase": phrases, "threshold": 0.1}, doseq=True)
    request = urllib.request.Request(f"{address}/api/segment?{query}", data=data)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def resident(process: int) -> int:
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(checkpoint: str, requests: int = 500, clients: int = 10) -> dict[str, float]:
    """Ask a server of its own, and return "answered", "right", "seconds" and the memory's "growth" after the first 50."""
    segmenter = Segmenter.from_pretrained(checkpoint, device="cpu", precision="float32")
    questions = []
    for number, data in enumerate(pictures()):
        phrases = _PHRASES[: 1 + number % len(_PHRASES)]
        answers = segmenter.predict(read_image(data), phrases, threshold=0.1)
        questions.append((data, phrases, json.loads(json.dumps(coco_results(answers, "")))))
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
                data, phrases, expected = questions[number % len(questions)]
                found = ask(address, data, phrases)
                memory.append(resident(server.pid))
                return found == expected

            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as crowd:
                right = list(crowd.map(one, range(requests)))
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
    print(json.dumps(load(args.checkpoint, args.requests, args.clients), indent=2))
