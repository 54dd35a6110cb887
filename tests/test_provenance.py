"""A run's provenance.json, and how the commit that runs is found."""

import json
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dcris.errors import DcrisError
from dcris.training.provenance import PROVENANCE
from dcris.utils.provenance import commit, describe
from dcris.version import __version__
from runs import quick_config, run_training


def test_a_resumed_run_has_two_sessions(scenes_root: Path, tmp_path: Path) -> None:
    """Who reads a score later finds the commands and the machines, and the hours in all."""
    out = tmp_path / "run"
    run_training(quick_config(2), scenes_root, out)
    first = json.loads((out / PROVENANCE).read_text())
    assert first["data_sha256"] == json.loads((out / "data.json").read_text())["sha256"]
    (session,) = first["sessions"]
    assert session["version"] == __version__
    assert session["libraries"]["torch"] == torch.__version__
    # Of the process that runs the tests, which under xdist is not called pytest.
    assert shlex.split(session["command"])[1:] == sys.orig_argv[1:]
    assert session["processes"] == 1

    made_up = {**session, "hours": 2.5}
    (out / PROVENANCE).write_text(json.dumps({**first, "sessions": [made_up]}))
    run_training(quick_config(2), scenes_root, out, resume=True)
    second = json.loads((out / PROVENANCE).read_text())
    assert second["sessions"][0] == made_up
    assert len(second["sessions"]) == 2
    assert second["hours"] == pytest.approx(2.5 + second["sessions"][1]["hours"])

    (out / PROVENANCE).write_text(json.dumps({"sessions": [{"hours": "two"}]}))
    with pytest.raises(DcrisError, match="not a record of a run's sessions; delete it"):
        run_training(quick_config(2), scenes_root, out, resume=True)


def test_the_command_can_be_given_again() -> None:
    found = describe(torch.device("cpu"))
    assert found["command"].split()[0].startswith("python")
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in a virtual environment may lie in the repository of another project, whose commit
    says nothing."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, encoding="utf-8")
        return done.stdout.strip()

    package, installed = tmp_path / "src/dcris", tmp_path / ".venv/lib/python3.11/site-packages/dcris"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1")
    git("init", "-q")
    git("add", "src")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert commit(package) == head
    (tmp_path / "untracked").touch()
    assert commit(package) == head
    (package / "a.py").write_text("2")
    assert commit(package) == f"{head}+changes"
    # A run that a hook of another repository starts has that one's variables.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    assert commit(package) == f"{head}+changes"
    monkeypatch.delenv("GIT_DIR")
    (package / "a.py").write_text("1")
    index = (tmp_path / ".git/index").read_bytes()
    assert commit(package) == head
    assert (tmp_path / ".git/index").read_bytes() == index  # which another git may be writing
    (package / "a.py").write_text("2")

    class Release:
        source: str | None = None

        def read_text(self, name: str) -> str | None:
            return self.source if name == "direct_url.json" else None

    monkeypatch.setattr(metadata, "distribution", lambda name: Release())
    assert commit(installed) is None
    Release.source = json.dumps({"url": "https://example.org/dcris", "vcs_info": {"vcs": "git", "commit_id": "abc1"}})
    assert commit(installed) == "abc1"
    Release.source = "{"
    assert commit(installed) is None
