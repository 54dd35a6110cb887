"""The documentation: every shell and Python block in it runs, in order, page by page; and the site builds without a warning.

A block that cannot run here says why in a comment above it, `<!-- not run here: REASON -->`; the commands in it are still
parsed, so that an option that was renamed is noticed there too.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import make_tiny_refer
from dcris.cli import _parser
from dcris.errors import DcrisError

REPOSITORY = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((REPOSITORY / "docs").glob("*.md")))]
_FENCE = re.compile(
    r"(?:^<!-- not run here: (?P<reason>[^>]+) -->\n+)?^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass
class Block:
    language: str
    code: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [Block(match["language"], match["code"], match["reason"]) for match in _FENCE.finditer(text)]


def commands(code: str) -> list[list[str]]:
    """The arguments of each call of dcris in a shell block, whoever starts it (torchrun, an environment's path)."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in {"&&", ";", "|", "&"}), len(words))
            command, words = words[:end], words[end + 1 :]
            for place, word in enumerate(command):
                is_module = word == "dcris" and place > 0 and command[place - 1] == "-m"
                if is_module or (
                    word.rpartition("/")[2] == "dcris" and all("=" in before for before in command[:place])
                ):
                    found.append(command[place + 1 :])
                    break
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """Else a shell block without a language would be a block that nobody runs."""
    for block in blocks(page):
        assert block.language in {"sh", "python", "json", "text", "yaml", "toml", "html"}, f"{page}: {block.code[:80]}"
        assert block.reason is None or block.language in {"sh", "python"}
        if block.language in {"text", "json"}:
            assert not re.search(r"^(dcris|pip|python3?|torchrun) ", block.code, re.M), (
                f"{page} hides a command: {block.code}"
            )


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    """An option that was renamed or is misspelt is noticed also where the command cannot run here."""
    for block in blocks(page):
        for command in commands(block.code) if block.language == "sh" else ():
            try:
                args, rest = _parser().parse_known_args(command)
            except DcrisError as error:
                raise AssertionError(f"{page}: dcris {shlex.join(command)}: {error}") from error
            except SystemExit as exit_interrupted:  # --help, --version
                assert exit_interrupted.code == 0
                continue
            assert not rest or getattr(args, "takes_settings", False), f"{page}: {command}"


@pytest.fixture
def desk(trained_run: Path, scenes_root: Path, tmp_path: Path) -> Path:
    """A folder with what the pages take for granted: photographs, a data set, runs."""
    make_tiny_refer(tmp_path / "ROOT")
    refer = make_tiny_refer(tmp_path / "ROOT")
    refer.dataset, refer.split_by = "refcoco", "unc"
    refer.write()
    shutil.copytree(scenes_root, tmp_path / "data/scenes")
    for name in ("tiny", "other", "quickstart"):
        shutil.copytree(trained_run, tmp_path / "runs" / name)
    (tmp_path / "photos").mkdir()
    for place in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        pixels = np.random.default_rng(len(place)).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / place)
    for name in ("constraints.txt", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    _own_data(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    # What a page trains in minutes is trained here for three steps: whether it is any good is for other tests.
    script = (
        f'#!/bin/sh\nif [ "$1" = train ]; then set -- "$@" --train.max_steps 3 --train.log_every 1; fi\n'
        f'exec {shlex.quote(sys.executable)} -m dcris "$@"\n'
    )
    (programs / "dcris").write_text(script)
    (programs / "dcris").chmod(0o755)
    return tmp_path


def _own_data(folder: Path) -> None:
    lines = []
    for number, split in enumerate(("train", "train", "val")):
        shutil.copy(folder / "photo.jpg", folder / "photos" / f"own{number}.jpg")
        mask = np.zeros((60, 80), np.uint8)
        mask[10:40, 20:60] = 255
        Image.fromarray(mask).save(folder / "photos" / f"own{number}.png")
        lines.append(
            f'{{"image": "photos/own{number}.jpg", "mask": "photos/own{number}.png", '
            f'"expressions": ["left thing"], "split": "{split}"}}\n'
        )
    (folder / "my.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in {"sh", "python"} for block in blocks(page))]
)
def test_every_block_runs(page: str, desk: Path) -> None:
    """What people copy works, in the order in which it stands. Python blocks of a page are one session."""
    environment = {
        **os.environ,
        "PATH": f"{desk / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    session = ""
    for number, block in enumerate(blocks(page)):
        if block.reason is not None or block.language not in {"sh", "python"}:
            continue
        if block.language == "sh":
            words = ["bash", "-e", "-c", block.code]
        else:
            session += block.code
            words = [sys.executable, "-c", session]
        done = subprocess.run(
            words, cwd=desk, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (
            f"{page}, block {number + 1}:\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """No dead link, no page that the menu forgot, no name in the API reference that is gone."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "api.html", "quickstart.html"} <= pages
    assert "from_pretrained" in (tmp_path / "site/api.html").read_text(encoding="utf-8")
    outside = re.findall(
        r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (tmp_path / "site/index.html").read_text()
    )
    assert not outside, "the site fetches things from elsewhere"
