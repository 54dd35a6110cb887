"""The paper's tables 2 to 5 and figure 2 as data: rows, their changes, and the published values.

Scores are the paper's "IoU" on val, testA and testB of RefCOCO, which is most likely the mIoU. The
text of the paper has no values of table 4 and figure 2 except those of rows in other tables.
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
}
