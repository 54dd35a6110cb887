"""Compile LaTeX with the system's pdflatex."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_pdflatex = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="there is no pdflatex; install Debian's texlive-latex-base"
)


def compile_latex(folder: Path, document: str) -> Path:
    """Compile a document in a folder, and return the PDF."""
    (folder / "document.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"],
        cwd=folder,
        capture_output=True,
        encoding="latin-1",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return folder / "document.pdf"
