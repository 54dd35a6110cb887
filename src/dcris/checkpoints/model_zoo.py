"""The models that have a name: those in the package, and the published DETRIS checkpoints with
their files, checksums, and scores of their authors.
"""

from dataclasses import dataclass

PACKAGED = ("photos", "tiny")
"""Models that are part of the package: directories of dcris.assets."""

REPOSITORY = "thuteam/DETRIS"
LICENCE = "mit"


@dataclass(frozen=True, slots=True)
class Published:
    """One published checkpoint."""

    dataset: str
    split_by: str | None
    word_length: int
    scores: tuple[tuple[str, float, float], ...]
    """Split, mIoU and oIoU in percent from the authors' README, not measured with dcris."""
    size: str
    """base, large or mix: the folder, and the start of the file name."""
    file: str | None = None
    """None if the file name is not known; the file is then searched in the repository."""
    sha256: str | None = None
    """None if it is not known; that of the first download is then expected in later ones."""


_UNC = ("val", "testA", "testB")
_UMD, _GOOGLE = ("val", "test"), ("val",)


def _scores(
    splits: tuple[str, ...], miou: tuple[float, ...], oiou: tuple[float, ...]
) -> tuple[tuple[str, float, float], ...]:
    return tuple(zip(splits, miou, oiou, strict=True))


PUBLISHED: dict[str, Published] = {
    "detris-b-refcoco": Published(
        "refcoco",
        "unc",
        17,
        _scores(_UNC, (76.0, 78.2, 73.5), (74.3, 77.6, 71.4)),
        "base",
        "base/base_refcoco.pth",
        "f52c5b00b713281c7c894d17003bd641b11e2a9a993f41e44a4a06ad2ca431d5",
    ),
    "detris-b-refcoco+": Published(
        "refcoco+",
        "unc",
        17,
        _scores(_UNC, (68.9, 74.0, 61.5), (65.6, 72.0, 56.5)),
        "base",
        "base/base_refcoco+.pth",
        "cdcc780f9ee49b561db0a6812dd5ec3879227d5e1aff049056c0ff170cf01899",
    ),
    "detris-b-refcocog-umd": Published(
        "refcocog",
        "umd",
        22,
        _scores(_UMD, (67.9, 68.1), (65.2, 66.4)),
        "base",
        "base/base_refcocog_u.pth",
        "afec3bca7f02abde52713b4b2de4a13aa1a9a72312dc959e238e8595a0fc7e79",
    ),
    "detris-b-refcocog-google": Published(
        "refcocog",
        "google",
        17,
        _scores(_GOOGLE, (65.9,), (63.2,)),
        "base",
        "base/base_refcocog_g.pth",
        "c5ac5531fdb02df8caecde84329c48e77dd845f8063a6cd1a705f8ac2ccd4c5c",
    ),
    "detris-l-refcoco": Published("refcoco", "unc", 17, _scores(_UNC, (77.3, 79.0, 75.2), (76.1, 78.3, 73.2)), "large"),
    "detris-l-refcoco+": Published(
        "refcoco+", "unc", 17, _scores(_UNC, (70.8, 75.3, 64.7), (67.9, 73.3, 60.2)), "large"
    ),
    "detris-l-refcocog-umd": Published("refcocog", "umd", 22, _scores(_UMD, (69.3, 70.2), (66.8, 68.0)), "large"),
    "detris-l-refcocog-google": Published("refcocog", "google", 17, _scores(_GOOGLE, (67.9,), (65.0,)), "large"),
    "detris-l-mixed": Published(
        "mixed-unfiltered",
        None,
        17,
        (
            *_scores(_UNC, (81.0, 81.9, 79.0), (80.7, 82.2, 77.9)),
            *_scores(("RefCOCO+ val", "RefCOCO+ testA", "RefCOCO+ testB"), (75.2, 78.6, 70.2), (73.1, 77.5, 66.0)),
            *_scores(("G-Ref umd val", "G-Ref umd test"), (74.6, 75.3), (73.2, 74.7)),
        ),
        "mix",
    ),
}
"""By the short names for `Segmenter.from_pretrained` and the command line."""
