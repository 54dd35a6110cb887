"""The image of `Dockerfile` and the Space: what they copy, what they run, and who may use them.

No test builds an image, which takes gigabytes. They take the instructions from the files and run
what those start.
"""

import base64
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcris.cli import _parser, main
from dcris.data.photographs import example_photographs

REPOSITORY = Path(__file__).parents[1]
SPACE = REPOSITORY / "examples/space"


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def the(name: str, path: Path = REPOSITORY / "Dockerfile") -> str:
    """Arguments of the last instruction of that name, which is the one that counts."""
    return [arguments for found, arguments in instructions(path) if found == name][-1]


def default_command() -> list[str]:
    """The arguments of dcris in a container that is started without any."""
    assert json.loads(the("ENTRYPOINT")) == ["dcris"]
    command: list[str] = json.loads(the("CMD"))
    return command


def test_the_wheel_builds_from_what_is_copied(tmp_path: Path) -> None:
    """The image has the whole package, although .dockerignore keeps everything else out."""
    ignore = (REPOSITORY / ".dockerignore").read_text().split("\n")
    assert "*" in ignore
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {
        source
        for name, words in instructions(REPOSITORY / "Dockerfile")
        if name == "COPY"
        for source in words.split()[:-1]
    }
    assert copied == kept
    for name in copied:
        place = REPOSITORY / name
        shutil.copytree(place, tmp_path / name) if place.is_dir() else shutil.copy(place, tmp_path / name)
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    package = REPOSITORY / "src/dcris"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("dcris/")}
    assert packed == {f"dcris/{path.relative_to(package).as_posix()}" for path in files}


def test_torch_has_the_pinned_version() -> None:
    """PyTorch is installed by itself, from its own index, at the version that the tests use."""
    (run,) = (
        words for name, words in instructions(REPOSITORY / "Dockerfile") if name == "RUN" and "TORCH_INDEX" in words
    )
    (search,) = re.findall(r"\$\((grep .*?)\)", run)
    found = subprocess.run(["bash", "-c", search], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==\d[\d.]*\n", found)
    assert f"{found.strip()}+cpu" in (SPACE / "requirements.txt").read_text().split("\n")


@pytest.mark.parametrize("path", [REPOSITORY / "Dockerfile", SPACE / "Dockerfile"], ids=["image", "space"])
def test_the_program_has_no_rights(path: Path) -> None:
    """A defect of the server must not give the rights of root in the container."""
    names = [name for name, _ in instructions(path)]
    assert the("USER", path) == "1000:1000"  # by number, as Kubernetes checks it
    assert "RUN" not in names[names.index("USER") :]  # only root may install
    assert "useradd --create-home --uid 1000" in path.read_text()


def test_a_container_needs_a_password(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, anybody who reaches the port could use the model."""
    pytest.importorskip("gradio")
    monkeypatch.delenv("DCRIS_WEB_AUTH", raising=False)
    assert main([*default_command(), "--port", "0"]) == 2
    assert "set a password with DCRIS_WEB_AUTH or --auth USER:PASSWORD, or give --no-auth" in capsys.readouterr().err


def test_the_documented_commands_are_understood() -> None:
    """What follows the image's name is a command of dcris."""
    text = (REPOSITORY / "docs/containers.md").read_text(encoding="utf-8")
    found = re.findall(r"^docker run .* dcris (\w+ .*)$", text, re.M)
    assert len(found) == 4
    for command in found:
        args, rest = _parser().parse_known_args(shlex.split(command))
        assert not rest, command
        if args.name == "web":
            assert args.no_auth or "-e DCRIS_WEB_AUTH" in text


@contextmanager
def serving(words: list[str], **environment: str) -> Iterator[int]:
    """Port of a server that prints its address, started with further environment variables."""
    pytest.importorskip("gradio")
    dropped = {"DCRIS_WEB_AUTH", "SPACE_HOST", "DCRIS_MODEL"}
    settings = {name: value for name, value in os.environ.items() if name not in dropped} | environment
    settings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *words], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = re.match(r"http://[\d.]+:(\d+) ", process.stdout.readline())
        assert found, process.communicate()
        try:
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)


def predicted(port: int, user: str | None = None) -> dict[str, Any]:
    """What the server answers about a photograph, as the client of a published port asks it."""
    (path, phrases), *_ = example_photographs()
    query = urllib.parse.urlencode({"phrase": phrases[0]})
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/segment?{query}", data=path.read_bytes())
    request.add_header("Host", "localhost:8000")
    if user is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)[0]
    return answer


@pytest.mark.slow
def test_the_default_command_serves_photographs() -> None:
    """The server of the image answers its health check and those who know the password."""
    check = json.loads(the("HEALTHCHECK").partition("CMD ")[2])
    assert check[0] == "python"

    def healthy() -> bool:
        words = [sys.executable, *(word.replace(":7860/", f":{port}/") for word in check[1:])]
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0

    with serving(["-m", "dcris", *default_command(), "--port", "0"], DCRIS_WEB_AUTH="ann:secret") as port:
        assert healthy()
        assert predicted(port, user="ann:secret")["bbox"][2] > 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            predicted(port)
    assert not healthy()


def test_the_space_describes_itself() -> None:
    """The Hub reads these fields; a wrong one makes a Space that does not start."""
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["sdk"] == "docker"
    assert {fields["colorFrom"], fields["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert len(fields["title"]) > 0
    assert str(fields["app_port"]) == the("EXPOSE", SPACE / "Dockerfile")
    copied = {
        source for name, words in instructions(SPACE / "Dockerfile") if name == "COPY" for source in words.split()[:-1]
    }
    assert copied - {path.name for path in SPACE.iterdir()} == {"constraints.txt", "*.whl"}  # which README.md adds
    assert "cp examples/space/* constraints.txt" in text
    assert 'pip wheel --no-deps --wheel-dir "$SPACE" .' in text


def test_the_space_is_open_only_on_the_hub() -> None:
    """On the Hub everyone may use it, unless it has a password; elsewhere, this machine only."""
    arguments = runpy.run_path(str(SPACE / "app.py"))["arguments"]

    def parsed(**environment: str) -> Any:
        args, rest = _parser().parse_known_args(arguments(environment))
        assert not rest
        return args

    alone = parsed()
    assert (alone.host, alone.no_auth, alone.checkpoints) == ("127.0.0.1", False, ["photos"])
    hub = parsed(SPACE_HOST="ann-demo.hf.space, demo.example.org", DCRIS_MODEL="ann/model")
    assert (hub.host, hub.port, hub.no_auth) == ("0.0.0.0", 7860, True)
    assert (hub.allow_host, hub.checkpoints) == (["ann-demo.hf.space", "demo.example.org"], ["ann/model"])
    assert hub.allow_frame == ["https://huggingface.co"]
    assert not parsed(SPACE_HOST="ann-demo.hf.space", DCRIS_WEB_AUTH="ann:secret").no_auth


@pytest.mark.slow
def test_the_space_serves_photographs() -> None:
    """The program of the Space answers on this machine, without the Hub."""
    with serving([str(SPACE / "app.py")], PORT="0") as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response:
            assert json.load(response) == {"status": "ok"}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as response:
            assert "dcris: segment by phrase" in response.read().decode()
        assert predicted(port)["bbox"][2] > 0
