"""Documentation tests: all shell and Python blocks run page by page, and the site builds without
warnings.

A block that cannot run in the tests has a comment before it, `<!-- not run here: REASON -->`. Its
commands and settings are still parsed, so that renamed options are found there, too.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import make_tiny_refer
from dcris.cli import _parser
from dcris.cli.common import parse_settings
from dcris.config import (
    DataConfig,
    HeadConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    replace,
)
from dcris.errors import DcrisError
from dcris.models.adapters.dcris import DenseCrossConfig
from dcris.recipes import get_recipe

REPOSITORY = Path(__file__).parents[1]
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PAGES = [*ROOT_PAGES, *(f"docs/{page.name}" for page in sorted((REPOSITORY / "docs").glob("*.md")))]
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
    """Return the arguments of each call of dcris in a shell block, also behind torchrun or a
    path."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in {"&&", ";", "|", "&", ">"}), len(words))
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
    """Every block names a known language; a block without one would not be run."""
    for block in blocks(page):
        assert block.language in {"sh", "python", "json", "text", "yaml", "toml", "html", "bibtex"}, (
            f"{page}: {block.code[:80]}"
        )
        assert block.reason is None or block.language in {"sh", "python"}
        if block.language in {"text", "json"}:
            assert not re.search(r"^(dcris|pip|python3?|torchrun) ", block.code, re.M), (
                f"{page} hides a command: {block.code}"
            )


def parse(command: list[str]) -> None:
    """Parse a command as dcris does, with its settings. Raises DcrisError where something is
    unknown."""
    args, rest = _parser().parse_known_args(command)
    if not getattr(args, "takes_settings", False):
        if rest:
            raise DcrisError(f"unknown argument {rest[0]!r}")
        return
    recipe = f"dcris_{args.recipe or 'b'}" if args.name == "ablate" else args.recipe
    # A recipe that is a file of the reader's has the sections of every recipe.
    recipe = "dcris_b" if recipe.endswith(".json") else recipe
    replace(get_recipe(recipe), parse_settings(rest))


@pytest.mark.parametrize("page", PAGES)
def test_prose_wraps_at_100_characters(page: str) -> None:
    """Tables, blocks, images, links alone on a line and HTML may be wider."""
    lines = _FENCE.sub("", (REPOSITORY / page).read_text(encoding="utf-8")).splitlines()
    assert not [line for line in lines if len(line) > 100 and line[0] not in "|<![#"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    """Renamed or misspelt options and settings are found, also in blocks that cannot run here."""
    for block in blocks(page):
        for command in commands(block.code) if block.language == "sh" else ():
            try:
                parse(command)
            except DcrisError as error:
                raise AssertionError(f"{page}: dcris {shlex.join(command)}: {error}") from error
            except SystemExit as exit_interrupted:  # --help, --version
                assert exit_interrupted.code == 0


@pytest.mark.parametrize(
    "line",
    [
        "dcris train dcris_tiny --data ROOT --out RUN --train.learning_rate 1e-3",
        "dcris train dcris_tiny --data ROOT --out RUN --trian.lr 1e-3",
        "dcris train dcris_tiny --data ROOT --out RUN --train.lr=fast",
        "dcris train dcris_huge --data ROOT --out RUN",
        "torchrun --nproc-per-node 2 -m dcris train dcris_b --data ROOT --out RUN --train.epoch 3",
        "dcris predict RUN photo.jpg -e cup --outt out",
        "dcris evaluate RUN --data ROOT --train.lr 1e-3",
    ],
)
def test_misspelt_commands_are_found(line: str) -> None:
    """The test above can fail: it also reads what follows the options of `dcris train`."""
    (command,) = commands(line)
    with pytest.raises(DcrisError):
        parse(command)


def test_every_command_is_in_the_reference() -> None:
    """docs/cli.md lists all commands, and no others."""
    page = (REPOSITORY / "docs/cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `dcris ([a-z -]+)`", page, re.M)) == set(command_names(_parser()))


def command_names(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    """Yield the names of all commands, those of groups as "data check"."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield prefix.strip()
    for group in groups:
        for name, command in group.choices.items():
            yield from command_names(command, f"{prefix} {name}")


@pytest.mark.parametrize("page", ROOT_PAGES)
def test_links_between_root_pages_and_docs(page: str) -> None:
    """Relative links lead to files of the repository. mkdocs checks those between pages of docs/
    only."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert re.match(r"https?://", target) or (REPOSITORY / target).exists(), f"{page}: {target}"


@pytest.fixture
def folder(trained_run: Path, scenes_root: Path, tmp_path: Path) -> Path:
    """Return a folder with the files that the pages use: images, a data set, runs."""
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
    # Pages train for minutes. Three steps are enough here, as other tests check what training
    # achieves.
    script = (
        f'#!/bin/sh\nif [ "$1" = train ]; then set -- "$@" --train.max_steps 3 --train.warmup_steps 0 --train.log_every 1; fi\n'
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
    images, annotations = [], []
    for number in range(3):
        images.append({"id": number, "file_name": f"own{number}.jpg", "height": 60, "width": 80})
        for category, left in ((1, 5), (2, 45)):
            outline = [left, 10, left + 30, 10, left + 30, 40, left, 40]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": category, "iscrowd": 0})
            annotations[-1]["segmentation"] = [outline]
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]
    export = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(export))
    (folder / "phrases.txt").write_text("left cup\nplate\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in {"sh", "python"} for block in blocks(page))]
)
def test_every_block_runs(page: str, folder: Path) -> None:
    """The blocks of a page run in their order. Its Python blocks share one session."""
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
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
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, (
            f"{page}, block {number + 1}:\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """No dead link, no page missing from the navigation, no unknown name in the API reference."""
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
    settings = (tmp_path / "site/configuration.html").read_text(encoding="utf-8")
    for section in (
        RunConfig,
        ModelConfig,
        VisionConfig,
        TextConfig,
        HeadConfig,
        DataConfig,
        TrainConfig,
        DenseCrossConfig,
    ):
        for field in section.model_fields:
            assert f'id="{section.__module__}.{section.__name__}.{field}"' in settings
    outside = re.findall(
        r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (tmp_path / "site/index.html").read_text()
    )
    assert not outside, "the site loads scripts, styles or fonts from other servers"


def test_messages_call_encoders_as_the_documentation_does() -> None:
    """Names in code (towers.safetensors, train.shard_towers) stay."""
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                prose = node.value.replace("towers.safetensors", "")
                assert " " not in prose.strip() or not re.search(r"\b[Tt]owers?\b", prose), f"{path}, {node.lineno}"
