"""Tables as Markdown, LaTeX and CSV, and the delimiter of CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal

BLANK = "-"
"""A cell without a value."""

Mark = Literal["best", "second"]
Marks = Mapping[tuple[int, int], Mark]
"""Cells to emphasise, by row and column: the best is bold, the second underlined."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters and others that break lines or reverse the text of the cells after them."""
_MARKDOWN = re.compile(r"[\\|<`*~]|(?<![^\W_])_|_(?![^\W_])|\](?=\()|&(?=#?\w+;)")
"""What Markdown does not show as it is: a name could be a link, or an image of another server."""
_FORMULA = re.compile(r"\s*([=@\uff1d\uff20]|[+-](?![0-9.]+$)|[\uff0b\uff0d])")
"""What is a formula in a spreadsheet, also after spaces and in full width, unlike -1.5."""
_DECLARED = re.compile(r'"?sep=(.)"?\1*+[ \t]*+(?=[\r\n]|$)', re.IGNORECASE)
"""Spreadsheets save this line with as many empty cells as the others have."""
_MARKED_LATEX: Mapping[Mark, str] = {"best": r"\textbf{%s}", "second": r"\underline{%s}"}
_MARKED_MARKDOWN: Mapping[Mark, str] = {"best": "**%s**", "second": "<u>%s</u>"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], marks: Marks | None = None) -> str:
    """Return a Markdown table, padded to be readable as plain text; first column left-aligned,
    others right-aligned."""
    cells = [[_MARKDOWN.sub(r"\\\g<0>", _one_line(cell)) for cell in row] for row in (header, *rows)]
    for (row, column), kind in (marks or {}).items():
        cells[row + 1][column] = _MARKED_MARKDOWN[kind] % cells[row + 1][column]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if place == 0 else ":") for place, width in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{rule}|", *(line(row) for row in cells[1:])])


def latex(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    marks: Marks | None = None,
    spans: Sequence[tuple[str, int]] = (),
    parts: Mapping[int, str] | None = None,
) -> str:
    r"""Return a LaTeX tabular with the rules of the package booktabs.

    Args:
        header: one cell for each column.
        rows: the other rows.
        marks: cells to emphasise.
        spans: a first line above the header: texts and the numbers of columns that each spans, over
            the whole width.
        parts: headings of parts of the table, each by the number of its first row; an empty one is
            a rule alone.
    """
    width = len(header)
    lines = [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    if spans:
        cells, rules, column = [], [], 1
        for text, count in spans:
            cells.append(rf"\multicolumn{{{count}}}{{c}}{{{latex_text(text)}}}" if text else " & " * (count - 1))
            if text:
                rules.append(rf"\cmidrule(lr){{{column}-{column + count - 1}}}")
            column += count
        lines += [rf"{' & '.join(cells)} \\", "".join(rules)]
    lines += [_line([latex_text(cell) for cell in header]), r"\midrule"]
    for number, row in enumerate(rows):
        if parts and number in parts:
            lines += [r"\midrule"] if number else []
            if parts[number]:
                lines += [rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(parts[number])}}}}} \\", r"\midrule"]
        cells = [latex_text(cell) for cell in row]
        for column, cell in enumerate(cells):
            if kind := (marks or {}).get((number, column)):
                cells[column] = _MARKED_LATEX[kind] % cell
        lines.append(_line(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def ranks(cells: Sequence[str], blank: str = BLANK) -> dict[int, Mark]:
    """Return the rows with the best, that is the greatest, and the second number of a column; none
    if all are equal.

    Numbers are compared as they are shown, so that two that read alike have the same mark.
    """
    values = {row: float(cell) for row, cell in enumerate(cells) if cell != blank}
    greatest = sorted({*values.values()}, reverse=True)[:2]
    if len(greatest) < 2:
        return {}
    marks: dict[float, Mark] = {greatest[0]: "best", greatest[1]: "second"}
    return {row: marks[value] for row, value in values.items() if value in marks}


def score_text(value: float | None, form: str = ".1f") -> str:
    """Format a score of a result file; a dash for None, which is one that nothing counts for."""
    return BLANK if value is None else format(value, form)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as CSV (RFC 4180, but lines end in a line feed), without a last line feed.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    file = io.StringIO()
    plain = [[_one_line(cell) for cell in row] for row in (header, *rows)]
    cells = [[f"'{cell}" if _FORMULA.match(cell) else cell for cell in row] for row in plain]
    csv.writer(file, lineterminator="\n").writerows(cells)
    return file.getvalue().removesuffix("\n")


def declared_delimiter(text: str) -> tuple[str | None, str]:
    """Return the delimiter that Excel's first line ("sep=;") declares, or None, and the text after
    it, from the end of that line on."""
    declared = _DECLARED.match(text)
    return (declared[1], text[declared.end() :]) if declared else (None, text)


def latex_text(text: str) -> str:
    """Return text with LaTeX's special characters escaped, on one line."""
    return "".join(_LATEX.get(sign, sign) for sign in _one_line(text))


def _one_line(text: str) -> str:
    """Return text with spaces in place of control characters, some of which end a line."""
    return _CONTROL.sub(" ", text)


def _line(cells: Sequence[str]) -> str:
    # After a line break or a rule, "[" would begin an optional argument, and "*" belong to the
    # command.
    return re.sub(r"^\s*[\[*]", r"{\g<0>}", " & ".join(cells)) + r" \\"
