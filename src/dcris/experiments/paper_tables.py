"""The paper's tables 1 to 5 and figure 2 as data: rows, their changes, and the published values;
and a table of options that are not in the paper.

Scores are the paper's "IoU". In tables 2 to 5 it is on val, testA and testB of RefCOCO and most
likely the mIoU; in table 1 the rows differ in it (docs/paper_and_code.md). The text of the paper
has no values of table 4 and figure 2 except those of rows in other tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SIZES = ("b", "tiny", "photos")
"""Of the towers: endings of recipe names."""
SPLITS = ("val", "testA", "testB")
DATA_SET = ("refcoco", "unc")
"""The data set and partition of SPLITS."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a recipe and changes to it."""

    cells: tuple[str, ...]
    """The row's names in the table's columns."""
    recipe: str = "dcris"
    """The recipe without its size (_b, _tiny, _photos)."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe. Widths are of size b; for another size they are scaled
    by the ratio of the two recipes' widths."""
    name: str = ""
    """Short name of the row; the first cell if empty."""
    parameters: str = ""
    """Published number of trainable weights without the head."""
    scores: tuple[float, float, float] | None = None
    sizes: tuple[str, ...] = SIZES
    """Those for which the row is run. A row without "b" is not in the paper."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    """Headings of the cells."""
    rows: tuple[Row, ...]


_DEFAULT = (76.4, 77.9, 73.7)
_FIXED = (74.9, 77.1, 72.0)


def _on(*layers: int) -> dict[str, Any]:
    """Return the changes for adapters on these blocks of both towers."""
    return {"model.method.visual.layers": layers, "model.method.text.layers": layers}


def _options(**train: Any) -> dict[str, Any]:
    """Return the changes for no options of training but these."""
    return {f"train.{name}": value for name, value in ({"ema": None, "masking": None} | train).items()}


_OF_TRANSFORMERS: tuple[str, ...] = ("b", "tiny")
"""Sizes whose towers both have 12 transformer blocks, as the paper's have."""

_METHODS = (
    Row(("Full tuning",), "full", parameters="149.97M", scores=(65.1, 68.1, 61.4)),
    Row(("Fixed backbone",), "fixed", name="fixed backbone", parameters="0.00M", scores=_FIXED),
    Row(("Adapter (Houlsby)",), "houlsby", parameters="1.98M", scores=(71.2, 73.3, 68.3)),
    Row(("Compacter",), "compacter", parameters="1.62M", scores=(73.9, 75.8, 70.8)),
    Row(("LoRA",), "lora", parameters="1.57M", scores=(73.4, 75.7, 70.2)),
    Row(("ETRIS",), "etris", parameters="1.38M", scores=(74.5, 76.5, 72.9), sizes=_OF_TRANSFORMERS),
    Row(
        ("DCRIS, 3 layers",),
        changes=_on(4, 8, 11),
        parameters="1.34M",
        scores=(75.8, 77.7, 72.9),
        sizes=_OF_TRANSFORMERS,
    ),
    Row(("DCRIS",), parameters="2.69M", scores=_DEFAULT),
)
_FURTHER = tuple(
    Row((name,), method, sizes=sizes)
    for name, method, sizes in (
        ("AdaptFormer", "adaptformer", ("tiny", "photos")),
        ("BitFit", "bitfit", ("tiny", "photos")),
        ("Prompt tokens", "prompts", ("tiny", "photos")),
        ("BarLeRIa", "barleria", ("tiny",)),
    )
)
"""Methods that the paper mentions but does not run in table 2."""


def _widths(visual: int, text: int, *, parameters: str = "", scores: tuple[float, float, float] | None = None) -> Row:
    changes = {"model.method.visual.width": visual, "model.method.text.width": text}
    return Row((f"{visual}, {text}",), "dcris", changes, f"DCRIS {visual}, {text}", parameters, scores)


_WIDTHS = (
    _widths(64, 64),
    replace(_widths(128, 64, parameters="2.69M", scores=(76.42, 77.91, 73.65)), name="DCRIS"),
    _widths(128, 128),
    _widths(256, 128),
)


def _layers(parameters: str, scores: tuple[float, float, float], *layers: int) -> Row:
    name = f"DCRIS, {len(layers)} layers"
    return Row((str(len(layers)), str(list(layers))), "dcris", _on(*layers), name, parameters, scores, _OF_TRANSFORMERS)


TABLES = {
    "table2": Table("Table 2: methods", ("Method",), (*_METHODS, *_FURTHER)),
    "table3": Table(
        "Table 3: dense cross adapter (DA) and text adapter (TA)",
        ("DA", "TA"),
        (
            Row(("no", "no"), "fixed", name="fixed backbone", parameters="0.00M", scores=_FIXED),
            Row(("yes", "no"), changes={"model.method.text": None}, name="DA alone", scores=(75.4, 77.4, 72.2)),
            Row(("no", "yes"), changes={"model.method.visual": None}, name="TA alone", scores=(75.9, 77.5, 72.7)),
            Row(("yes", "yes"), name="DCRIS", parameters="2.69M", scores=_DEFAULT),
        ),
    ),
    "table4": Table("Table 4: widths of the two adapters", ("Widths",), _WIDTHS),
    "table5": Table(
        "Table 5: number and position of the adapters",
        ("Layers", "Position"),
        (
            _layers("0.45M", (75.40, 77.19, 72.04), 8),
            _layers("0.90M", (75.47, 77.41, 72.54), 6, 11),
            _layers("1.35M", (75.78, 77.65, 72.86), 4, 8, 11),
            _layers("1.80M", (75.98, 77.85, 73.34), 3, 6, 9, 11),
            _layers("2.25M", (76.22, 77.88, 73.48), 3, 5, 7, 9, 11),
            replace(_layers("2.69M", (76.42, 77.91, 73.65), 1, 3, 5, 7, 9, 11), name="DCRIS"),
            _layers("3.14M", (76.19, 78.07, 73.41), 1, 3, 5, 7, 9, 10, 11),
            _layers("3.59M", (75.71, 77.87, 73.34), 1, 3, 4, 5, 7, 9, 10, 11),
            _layers("5.39M", (76.11, 78.07, 73.49), *range(12)),
        ),
    ),
    "figure2": Table(
        "Figure 2: IoU against trainable weights",
        ("Model",),
        (
            *(replace(row, cells=(f"DCRIS {row.cells[0]}",)) for row in _WIDTHS),
            # All of table 2 except full tuning, which has fifty times as many
            # weights, and the default, which is above.
            *_METHODS[1:-1],
        ),
    ),
    "options": Table(
        "Options of training that are not in the paper",
        ("Option",),
        (
            Row(("none",), changes=_options(), name="DCRIS"),
            Row(("averages of weights (EMA)",), changes=_options(ema=0.99), name="EMA"),
            Row(("masking with distillation",), changes=_options(masking={}), name="masking"),
        ),
    ),
}


# ---- table 1 -------------------------------------------------------------------------------------


TABLE_1_SPLITS = (
    *(("refcoco", "unc", split) for split in SPLITS),
    *(("refcoco+", "unc", split) for split in SPLITS),
    ("refcocog", "umd", "val"),
    ("refcocog", "umd", "test"),
    ("refcocog", "google", "val"),
)
"""Data set, partition and split of each column of table 1."""


@dataclass(frozen=True, slots=True)
class System:
    """One row of table 1."""

    name: str
    venue: str
    group: str
    """Heading of its part of the table."""
    metric: str
    """Which score the row most likely shows, "miou" or "oiou"; docs/paper_and_code.md has the
    reasons."""
    scores: tuple[float | None, ...]
    """In percent, by TABLE_1_SPLITS; None where the row has none or the text of the paper lacks the
    cell."""
    average: float | None = None
    """As printed. In most rows it is the mean of the three data sets' means."""


_FULL, _EFFICIENT, _MIXED = "Traditional full fine-tuning", "Parameter-efficient training", "Mixed training data"

# The text of the paper lacks the first cell of CMPC+, CGAN, CGFormer, LISA-7B, MagNet, UNINEXT-L
# and the mixed DCRIS-L. Those of CGFormer and LISA-7B are from their own papers.
TABLE_1 = (
    System("RRN", "CVPR 18", _FULL, "oiou", (55.3, 57.3, 54.0, 39.8, 42.2, 36.1, None, None, 36.5), 43.8),
    System("MAttNet", "CVPR 18", _FULL, "oiou", (56.5, 62.4, 51.7, 46.7, 52.4, 40.1, 47.6, 48.6, None), 50.5),
    System("CMSA", "CVPR 19", _FULL, "oiou", (58.3, 60.6, 55.1, 43.8, 47.6, 37.9, None, None, 40.0), 47.0),
    System("CAC", "BMVC 19", _FULL, "oiou", (58.9, 61.8, 53.8, None, None, None, 46.4, 47.0, 44.3)),
    System("BRINet", "CVPR 20", _FULL, "oiou", (61.4, 63.4, 59.6, 48.6, 52.9, 42.1, None, None, 48.0), 52.5),
    System("CMPC+", "TPAMI 21", _FULL, "oiou", (None, 64.5, 59.6, 49.6, 53.4, 43.2, None, None, None)),
    System("CGAN", "ACMMM 20", _FULL, "oiou", (None, 68.0, 62.1, 51.0, 55.5, 44.1, 51.0, 51.7, None), 55.5),
    System("LTS", "CVPR 21", _FULL, "oiou", (65.4, 67.8, 63.1, 54.2, 58.3, 48.0, None, None, None)),
    System("VLT", "ICCV 21", _FULL, "oiou", (65.7, 68.3, 62.7, 55.5, 59.2, 49.4, None, None, 49.8), 56.7),
    System("ResTR", "CVPR 22", _FULL, "oiou", (67.2, 69.3, 64.5, 55.8, 60.4, 48.3, 54.5, None, 54.5), 58.8),
    System("CRIS", "CVPR 22", _FULL, "miou", (70.5, 73.2, 66.1, 62.3, 68.1, 53.7, 59.9, 60.4, None), 63.8),
    System("LAVT", "CVPR 22", _FULL, "oiou", (72.7, 75.8, 68.8, 62.1, 68.4, 55.1, None, None, 60.5), 64.9),
    System("SEEM", "NeurIPS 23", _FULL, "oiou", (None, None, None, None, None, None, 65.6, None, None)),
    System("VPD", "ICCV 23", _FULL, "oiou", (73.5, None, None, 63.9, None, None, 63.1, None, None), 66.8),
    System("ReLA", "CVPR 23", _FULL, "oiou", (73.8, 76.5, 70.18, 66.0, 71.0, 57.7, 65.0, 66.0, 62.7), 67.5),
    System("CGFormer", "CVPR 23", _FULL, "oiou", (74.75, 77.3, 70.6, 64.5, 71.0, 57.1, 64.7, 65.1, 62.5), 67.7),
    System("LISA-7B", "CVPR 24", _FULL, "oiou", (74.1, 76.5, 71.1, 62.4, 67.4, 56.5, 66.4, 68.5, None), 67.9),
    System("MagNet", "CVPR 24", _FULL, "oiou", (None, 78.2, 71.1, 66.2, 71.3, 58.1, 65.4, 66.2, 63.1), 68.3),
    System("ETRIS", "ICCV 23", _EFFICIENT, "miou", (70.5, 73.5, 66.6, 60.1, 66.9, 50.2, 59.8, 59.9, 57.9), 62.8),
    System("BarLeRIa", "ICLR 24", _EFFICIENT, "miou", (72.4, 75.9, 68.3, 65.0, 70.8, 56.9, 63.4, 63.8, 61.6), 66.5),
    System("DCRIS-B", "", _EFFICIENT, "miou", (76.4, 77.9, 73.7, 69.8, 74.4, 62.6, 68.4, 68.5, 65.9), 70.8),
    System("DCRIS-L", "", _EFFICIENT, "miou", (77.9, 79.0, 75.0, 71.9, 75.9, 65.7, 70.1, 70.9, 68.5), 72.8),
    System("PolyFormer-L", "CVPR 23", _MIXED, "oiou", (76.0, 78.3, 73.3, 69.3, 74.6, 61.9, 69.2, 70.2, None), 71.6),
    System("UNINEXT-L", "CVPR 23", _MIXED, "oiou", (None, 82.6, 77.8, 70.0, 74.9, 62.6, 73.4, 73.7, None), 74.4),
    System("DCRIS-L, mixed", "", _MIXED, "oiou", (None, 82.9, 77.9, 73.3, 78.3, 65.8, 74.1, 75.5, None), 76.1),
)
"""The systems of table 1, in its order."""
