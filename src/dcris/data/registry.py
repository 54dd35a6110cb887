"""Facts about the known data sets, all in one place: RefCOCO, RefCOCO+ and RefCOCOg; gRefCOCO,
Ref-ZOM and R-RefCOCO, whose expressions may have several targets or none; and RRSIS-D, RefSegRS,
ReasonSeg, PhraseCut, RefCOCO-M and GSEval. VIDEO_SETS has the data sets of videos.

The partitions of the first two groups and RefCOCO-M describe images of COCO train2014 (Ref-ZOM also
of val2014), and many of PhraseCut's images are in COCO, so the train split of one may contain
images of another one's val and test splits; see dcris.data.mixing. Facts about COCO itself (file
names, categories, server) are in dcris.data.coco.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OFFICIAL = "official"
"""`split_by` of data sets whose authors divide them in one way and give it no name."""


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
    mixed: bool = False
    """Whether it is part of the mixture "mixed"."""
    source: str = ""
    """Where its authors publish it, if `dcris data fetch` cannot download it; and the layout in
    which it is read, as a sentence's end."""
    image_folder: str | None = None
    """Folder of the images below the root, if they are not COCO's."""
    server_folder: str = "train2014"
    """Folder of the images on COCO's server."""
    stretched: bool = False
    """Whether images of another size than annotated are resized, as the authors' code does."""
    protocol: str = "cris"
    """Evaluation protocol of `dcris evaluate --all`: that of the data set's authors, or of the
    paper."""


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
    "refcoco": Dataset(word_length=17, split_by="unc", repository="jxu124/refcoco", mixed=True),
    "refcoco+": Dataset(word_length=17, split_by="unc", repository="jxu124/refcocoplus", mixed=True),
    "refcocog": Dataset(word_length=22, split_by="umd", repository="jxu124/refcocog", mixed=True),
    "grefcoco": Dataset(
        word_length=20,
        split_by="unc",
        repository="FudanCVL/gRefCOCO",
        files=("grefs(unc).json", "instances.json"),
        protocol="grefcoco",
    ),
    "ref-zom": Dataset(word_length=20, split_by="final", protocol="refzom"),
    "rrefcoco": Dataset(word_length=20, split_by="unc", protocol="rrefcoco"),
    "rrefcoco+": Dataset(word_length=20, split_by="unc", protocol="rrefcoco"),
    "rrefcocog": Dataset(word_length=20, split_by="umd", protocol="rrefcoco"),
    "rrsisd": Dataset(
        word_length=20,
        split_by="unc",
        source="https://github.com/Lsan2401/RMSIN; put refs(unc).p and instances.json into ROOT/rrsisd and the images into "
        "ROOT/images/rrsisd/JPEGImages",
        image_folder="images/rrsisd/JPEGImages",
        stretched=True,
        protocol="lavt",
    ),
    "refsegrs": Dataset(
        word_length=20,
        split_by=OFFICIAL,
        repository="JessicaYuan/RefSegRS",
        files=("RefSegRS.zip",),
        protocol="lavt",
    ),
    "reasonseg": Dataset(
        word_length=77,
        split_by=OFFICIAL,
        source="https://github.com/dvlab-research/LISA#dataset; put its folders train, val and test into "
        "ROOT/reason_seg/ReasonSeg",
        protocol="lisa",
    ),
    "phrasecut": Dataset(
        word_length=20,
        split_by=OFFICIAL,
        source="https://github.com/ChenyunWu/PhraseCutDataset; put refer_SPLIT.json, image_data_split.json, "
        "name_att_rel_count.json and the folder images into ROOT/VGPhraseCut_v0",
        protocol="phrasecut",
    ),
    "refcoco-m": Dataset(word_length=17, split_by="unc", repository="moondream/refcoco-m"),
    "gseval": Dataset(
        word_length=77,
        split_by=OFFICIAL,
        repository="hustvl/GSEval",
        files=("GroundingSuite-Eval.jsonl",),
        server_folder="unlabeled2017",
        protocol="gseval",
    ),
}
"""By data set. Word lengths are those of CRIS, ETRIS and DETRIS; those of ReLA, DMMI and
RefSegformer for the generalised ones; those of RMSIN and LGCE (LAVT's 20) for RRSIS-D and RefSegRS;
and all that CLIP reads where the authors' models read any length."""

PARTITIONS: Mapping[tuple[str, str], Partition] = {
    ("refcoco", "unc"): Partition(
        {"train": (42_404, 120_624), "val": (3_811, 10_834), "testA": (1_975, 5_657), "testB": (1_810, 5_095)},
        cris_folder="refcoco",
    ),
    ("refcoco+", "unc"): Partition(
        {"train": (42_278, 120_191), "val": (3_805, 10_758), "testA": (1_975, 5_726), "testB": (1_798, 4_889)},
        cris_folder="refcoco+",
    ),
    # By object, as G-Ref's. Expressions: not stated. Source: ref_coco of
    # TensorFlow Datasets, made from the REFER release.
    ("refcoco", "google"): Partition(
        {"train": (40_000, None), "val": (5_000, None), "test": (5_000, None)}, shares_images=True
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
    # 17,402 in the README of RMSIN; by split in its paper (Liu et al., CVPR 2024, section 3).
    ("rrsisd", "unc"): Partition({"train": (12_181, None), "val": (1_740, None), "test": (3_481, None)}),
    # Yuan et al., "RRSIS", TGRS 2024: 4,420 triplets.
    ("refsegrs", OFFICIAL): Partition({"train": (None, 2_172), "val": (None, 431), "test": (None, 1_817)}),
    # The README of LISA. Expressions: several in train, one counts in val and test.
    ("reasonseg", OFFICIAL): Partition({"train": (239, None), "val": (200, 200), "test": (779, 779)}),
    # The README of PhraseCutDataset. Files of val leave miniv out.
    ("phrasecut", OFFICIAL): Partition(
        {
            "train": (310_816, 310_816),
            "val": (20_316 - 821, 20_316 - 821),
            "test": (14_354, 14_354),
            "miniv": (821, 821),
        }
    ),
    ("refcoco-m", "unc"): Partition({"val": (2_080, 5_598)}),
    # Lines of the authors' file; their README says 3,800.
    ("gseval", OFFICIAL): Partition({"test": (3_715, 3_715)}),
}
"""By data set and `split_by`."""


@dataclass(frozen=True, slots=True)
class VideoDataset:
    """Facts about a data set of videos."""

    splits: Mapping[str, tuple[int | None, int | None]]
    """Number of videos and of expressions of each split; None if no source states it."""
    source: str
    """Where its authors publish it, and the layout in which it is read, as a sentence's end."""
    folders: tuple[str, ...]
    """Names of its folder below the root, in the order in which they are looked for."""


VIDEO_SETS: Mapping[str, VideoDataset] = {
    # Videos: refer_youtube_vos_dataset.py of MTTR. Expressions: Seo et al., URVOS, ECCV 2020
    # (full-video).
    "ref_youtube_vos": VideoDataset(
        {"train": (3_471, 12_913), "valid": (202, None), "test": (305, None)},
        "https://youtube-vos.org/dataset/rvos (its server is offline at times; the authors' link to valid is in "
        "https://github.com/skynbe/Refer-Youtube-VOS/issues/7); put its folders train, valid, test and meta_expressions into "
        "ROOT/ref-youtube-vos",
        ("ref-youtube-vos", "ref_youtube_vos", "refer_youtube_vos"),
    ),
    # convert_davis_to_ytvos.py of ReferFormer.
    "ref_davis17": VideoDataset(
        {"train": (60, None), "valid": (30, None)},
        "https://davischallenge.org/davis2017/code.html (DAVIS-2017-Unsupervised-trainval-480p.zip) and "
        "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/video-segmentation/"
        "video-object-segmentation-with-language-referring-expressions (davis_text_annotations.zip); put the folders DAVIS and "
        "davis_text_annotations into ROOT/ref-davis",
        ("ref-davis", "ref_davis17", "ref-davis17"),
    ),
    # The README of MeViS.
    "mevis": VideoDataset(
        {"train": (1_662, 23_051), "valid_u": (50, 793), "valid": (140, 2_236)},
        "https://github.com/henghuiding/MeViS#mevis-dataset-download; put its folders train, valid_u and valid into ROOT/mevis",
        ("mevis", "MeViS"),
    ),
}
"""By data set; splits are named as in the authors' files."""


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
