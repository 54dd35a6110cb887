"""Facts about the known data sets, all in one place: RefCOCO, RefCOCO+ and RefCOCOg, and the
generalised gRefCOCO, Ref-ZOM and R-RefCOCO, whose expressions may have several targets or none.

Every partition below describes images of COCO train2014 (Ref-ZOM also of val2014), so the train
split of one may contain images of another one's val and test splits; see dcris.data.mixing. Facts
about COCO itself (file names, categories, server) are in dcris.data.coco.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Dataset:
    """Facts that hold for all partitions of a data set."""

    word_length: int
    """Usual number of tokens per expression, start and end token included."""
    split_by: str
    """The usual partition: the one in the Hub repository and in mixtures."""
    repository: str | None = None
    """Data set repository on the Hugging Face Hub with a copy of the annotations."""
    files: tuple[str, ...] = ()
    """Its files, which are those of the release: references, then instances. Empty for Parquet."""
    generalised: bool = False
    """Whether expressions may have several targets or none."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One division of a data set into splits, called `split_by` in REFER."""

    splits: Mapping[str, tuple[int | None, int | None]]
    """Number of references and of expressions of each split, as in the release; None if no source
    states it."""
    cris_folder: str | None = None
    """Folder below anns/ and masks/ in the layout of CRIS, ETRIS and DETRIS."""
    shares_images: bool = False
    """Whether splits share images by design, because the partition was made by object."""

    @property
    def held_out(self) -> tuple[str, ...]:
        """Splits for validation and testing: all except train."""
        return tuple(split for split in self.splits if split != "train")


DATASETS: Mapping[str, Dataset] = {
    "refcoco": Dataset(word_length=17, split_by="unc", repository="jxu124/refcoco"),
    "refcoco+": Dataset(word_length=17, split_by="unc", repository="jxu124/refcocoplus"),
    "refcocog": Dataset(word_length=22, split_by="umd", repository="jxu124/refcocog"),
    "grefcoco": Dataset(
        word_length=20,
        split_by="unc",
        repository="FudanCVL/gRefCOCO",
        files=("grefs(unc).json", "instances.json"),
        generalised=True,
    ),
    "ref-zom": Dataset(word_length=20, split_by="final", generalised=True),
    "rrefcoco": Dataset(word_length=20, split_by="unc", generalised=True),
    "rrefcoco+": Dataset(word_length=20, split_by="unc", generalised=True),
    "rrefcocog": Dataset(word_length=20, split_by="umd", generalised=True),
}
"""By data set. Word lengths are those of CRIS, ETRIS and DETRIS, and those of ReLA, DMMI and
RefSegformer for the generalised ones."""

PARTITIONS: Mapping[tuple[str, str], Partition] = {
    ("refcoco", "unc"): Partition(
        {"train": (42_404, 120_624), "val": (3_811, 10_834), "testA": (1_975, 5_657), "testB": (1_810, 5_095)},
        cris_folder="refcoco",
    ),
    ("refcoco+", "unc"): Partition(
        {"train": (42_278, 120_191), "val": (3_805, 10_758), "testA": (1_975, 5_726), "testB": (1_798, 4_889)},
        cris_folder="refcoco+",
    ),
    ("refcocog", "umd"): Partition(
        {"train": (42_226, 80_512), "val": (2_573, 4_896), "test": (5_023, 9_602)},
        cris_folder="refcocog_u",
    ),
    ("refcocog", "google"): Partition(
        {"train": (44_822, 85_474), "val": (5_000, 9_536)},
        cris_folder="refcocog_g",
        shares_images=True,
    ),
    # Counted in the authors' file of August 2023, in which identifiers were renumbered.
    ("grefcoco", "unc"): Partition(
        {"train": (None, None), "val": (None, 14_229), "testA": (None, 19_200), "testB": (None, 16_063)}
    ),
    ("ref-zom", "final"): Partition({"train": (None, None), "test": (None, None)}),
    ("rrefcoco", "unc"): Partition({"train": (None, None), "val": (None, None)}),
    ("rrefcoco+", "unc"): Partition({"train": (None, None), "val": (None, None)}),
    ("rrefcocog", "umd"): Partition({"train": (None, None), "val": (None, None)}),
}
"""By data set and `split_by`."""


def official_splits(dataset: str, split_by: str) -> Mapping[str, tuple[int | None, int | None]]:
    """Return the official references and expressions by split; empty for other data sets.

    A number that no source states is None.
    """
    partition = PARTITIONS.get((dataset, split_by))
    return {} if partition is None else partition.splits


def agrees(counts: tuple[int, int], official: tuple[int | None, int | None]) -> bool | None:
    """Return whether a split has its official size; None if nothing is known of it."""
    known = [count == size for count, size in zip(counts, official, strict=True) if size is not None]
    return all(known) if known else None


def word_length_settings(settings: Mapping[str, Any], current: str) -> dict[str, int]:
    """Return the usual `data.word_length` of the data set that the settings select.

    Empty unless the settings select a known data set other than `current`, the configured one, and
    do not give a word length themselves.
    """
    selected = settings.get("data.dataset")
    if not isinstance(selected, str) or selected not in DATASETS or selected == current:
        return {}
    if "data.word_length" in settings:
        return {}
    return {"data.word_length": DATASETS[selected].word_length}
