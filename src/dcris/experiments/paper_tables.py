"""The paper's tables 2 to 5 and figure 2 as data: the rows, what each changes, and the numbers printed beside it.

Scores are the paper's "IoU" on RefCOCO's val, testA and testB, which for its family is the mean of each expression's IoU. Of
table 4 and figure 2 only the rows that other tables repeat have numbers here.
"""

from dataclasses import dataclass

SPLITS = ("val", "testA", "testB")
DATA_SET = ("refcoco", "unc")
"""The data set and partition of which SPLITS are."""

WIDTHS = (128, 64)
"""Of the visual and the text adapter by default: what the other widths are to be measured against in a smaller model."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a method's recipe, and what is changed in it."""

    cells: tuple[str, ...]
    """What names the row, in the table's own columns."""
    method: str = "dcris"
    """The recipe, without the model's size behind it (_b, _tiny)."""
    layers: tuple[int, ...] | None = None
    """Blocks of both towers that get an adapter; None for the recipe's."""
    widths: tuple[int, int] | None = None
    """Of the visual and the text adapter, on the scale of WIDTHS; None for the recipe's."""
    dense: bool = True
    """Whether the visual adapter is there."""
    textual: bool = True
    """Whether the text adapter is there."""
    parameters: str = ""
    """The trainable weights beside the head, as printed."""
    scores: tuple[float, float, float] | None = None
    only: str | None = None
    """The model's size for which alone the row is run; such a row is not the paper's."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    """Headings of the rows' cells."""
    rows: tuple[Row, ...]


_DEFAULT = (76.4, 77.9, 73.7)
_FIXED = (74.9, 77.1, 72.0)

_METHODS = (
    Row(("Full tuning",), "full", parameters="149.97M", scores=(65.1, 68.1, 61.4)),
    Row(("Fixed backbone",), dense=False, textual=False, parameters="0.00M", scores=_FIXED),
    Row(("Adapter (Houlsby)",), "houlsby", parameters="1.98M", scores=(71.2, 73.3, 68.3)),
    Row(("Compacter",), "compacter", parameters="1.62M", scores=(73.9, 75.8, 70.8)),
    Row(("LoRA",), "lora", parameters="1.57M", scores=(73.4, 75.7, 70.2)),
    Row(("ETRIS",), "etris", parameters="1.38M", scores=(74.5, 76.5, 72.9)),
    Row(("DCRIS, 3 layers",), layers=(4, 8, 11), parameters="1.34M", scores=(75.8, 77.7, 72.9)),
    Row(("DCRIS",), parameters="2.69M", scores=_DEFAULT),
)
_FURTHER = tuple(
    Row((name,), method, only="tiny")
    for name, method in (
        ("AdaptFormer", "adaptformer"),
        ("BitFit", "bitfit"),
        ("Prompt tokens", "prompts"),
        ("BarLeRIa", "barleria"),
    )
)
"""Methods that the paper names and does not run in table 2."""

_WIDTHS = (
    Row(("64, 64",), widths=(64, 64)),
    Row(("128, 64",), widths=(128, 64), parameters="2.69M", scores=(76.42, 77.91, 73.65)),
    Row(("128, 128",), widths=(128, 128)),
    Row(("256, 128",), widths=(256, 128)),
)


def _layers(parameters: str, scores: tuple[float, float, float], *layers: int) -> Row:
    return Row((str(len(layers)), str(list(layers))), layers=layers, parameters=parameters, scores=scores)


TABLES = {
    "table2": Table("Table 2: methods", ("Method",), (*_METHODS, *_FURTHER)),
    "table3": Table(
        "Table 3: dense cross adapter (DA) and text adapter (TA)",
        ("DA", "TA"),
        (
            Row(("no", "no"), dense=False, textual=False, parameters="0.00M", scores=_FIXED),
            Row(("yes", "no"), textual=False, scores=(75.4, 77.4, 72.2)),
            Row(("no", "yes"), dense=False, scores=(75.9, 77.5, 72.7)),
            Row(("yes", "yes"), parameters="2.69M", scores=_DEFAULT),
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
            _layers("2.69M", (76.42, 77.91, 73.65), 1, 3, 5, 7, 9, 11),
            _layers("3.14M", (76.19, 78.07, 73.41), 1, 3, 5, 7, 9, 10, 11),
            _layers("3.59M", (75.71, 77.87, 73.34), 1, 3, 4, 5, 7, 9, 10, 11),
            _layers("5.39M", (76.11, 78.07, 73.49), *range(12)),
        ),
    ),
    "figure2": Table(
        "Figure 2: IoU against trainable weights",
        ("Model",),
        (
            *(
                Row((f"DCRIS {row.cells[0]}",), widths=row.widths, parameters=row.parameters, scores=row.scores)
                for row in _WIDTHS
            ),
            # All of table 2 but full tuning, whose weights are fifty times as many, and the default, which stands above.
            *_METHODS[1:-1],
        ),
    ),
}
