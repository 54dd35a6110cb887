"""The page that every report is: one HTML file that stands alone, its style, and text made safe for it.

No script, no network, pictures inside, so it can be mailed, archived or opened without a server. Its own content policy forbids
everything else, whatever a phrase may contain.
"""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dcris.utils.files import write_file

DASH = "\N{EN DASH}"


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of `parts`, HTML each, atomically; empty ones are left out. Raises DcrisError where it cannot."""
    page = _PAGE.format(title=text(title), style=_STYLE, body="\n".join(part for part in parts if part))
    # A phrase read from a damaged file may hold half a surrogate pair, which has no UTF-8 form.
    write_file(path, page.encode("utf-8", "replace"))


def text(value: str) -> str:
    """`value` made safe for an element and for a quoted attribute. Control characters go: no HTML file may hold them."""
    return html.escape(
        "".join(letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in value)
    )


def percent(value: float | int | str) -> str:
    """A percentage as HTML; a dash for what is not finite, and text as it is."""
    if isinstance(value, str):
        return text(value)
    return f"{value:.1f}<small>\N{NARROW NO-BREAK SPACE}%</small>" if math.isfinite(value) else DASH


def interval(bounds: Sequence[float]) -> str:
    """An interval of percentages, or of differences of them, as HTML."""
    between = " to " if min(bounds) < 0 else "\N{NARROW NO-BREAK SPACE}\N{EN DASH}\N{NARROW NO-BREAK SPACE}"
    return between.join(f"{bound:.1f}".replace("-", "\N{MINUS SIGN}") for bound in bounds)


def number(value: float | int | str) -> str:
    """A count or figure as plain text, with few digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1b2430; --quiet: #5d6b7c; --line: #e1e6ec; --grid: #edf0f4;
  --a: #0b6bd8; --b: #d05c00; --c: #16794a; --d: #b0249a; --e: #8a6d00; --f: #5b3fd6; --track: #e9eef4;
  --good: #16794a; --good-bg: #dcf5e7; --fair: #8a5a00; --fair-bg: #fdf0cf; --poor: #b3261e; --poor-bg: #fde4e1;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #19212b; --ink: #e8edf3; --quiet: #9aa8b8; --line: #2b3643; --grid: #242e3a;
    --a: #5aa9ff; --b: #ff9d4d; --c: #4cd08f; --d: #ff86e8; --e: #e3c44f; --f: #a994ff; --track: #273240;
    --good: #7fe0ae; --good-bg: #123b28; --fair: #f3cd77; --fair-bg: #43340d; --poor: #ff9d94; --poor-bg: #4b1a17;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 56px; display: grid; gap: 20px; }
main > * { min-width: 0; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: clamp(1.6rem, 5vw, 2.25rem); line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin-bottom: 12px; }
header p { color: var(--quiet); margin-top: 6px; overflow-wrap: anywhere; }
header b { color: var(--ink); font-weight: 600; }
section > h2 { font-size: 1.25rem; margin: 12px 0 2px; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  break-inside: avoid; min-width: 0; }
.card > h2 { margin-top: 0; font-size: 1.05rem; }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 225px), 1fr)); }
.tile h3 { font-size: .95rem; font-weight: 600; color: var(--quiet); }
.value { font-size: 2.4rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.03em; font-variant-numeric: tabular-nums; }
.value small { font-size: 1.1rem; font-weight: 500; color: var(--quiet); letter-spacing: 0; }
.hint { font-size: .85rem; line-height: 1.4; color: var(--quiet); margin-top: 4px; }
.interval { font-size: .85rem; font-variant-numeric: tabular-nums; }
.control { border-style: dashed; }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.bars { width: 100%; border-collapse: collapse; font-size: .92rem; }
.bars th { text-align: left; font-weight: 500; padding: 5px 14px 5px 0; overflow-wrap: anywhere; }
.bars thead th { font-size: .8rem; color: var(--quiet); font-weight: 500; }
.bars td { padding: 5px 0; }
.bars .track { width: 100%; min-width: 60px; }
.track div { position: relative; background: var(--track); border-radius: 5px; height: 10px; }
.track i { display: block; height: 100%; background: var(--a); border-radius: 5px; }
.track b { position: absolute; top: 4px; height: 2px; min-width: 2px; background: var(--ink);
  box-shadow: 0 0 0 1px var(--card); }
.scroll { overflow-x: auto; }
.scores { width: 100%; border-collapse: collapse; font-size: .92rem; }
.scores th, .scores td { text-align: left; font-weight: 500; padding: 6px 0 6px 18px; vertical-align: top; }
.scores th:first-child { padding-left: 0; }
.scores .figure { text-align: right; white-space: nowrap; }
.scores .figure:last-child { padding-right: 8px; }
.scores thead .figure { font-weight: 650; vertical-align: bottom; white-space: normal; }
.scores .part { padding: 18px 0 4px; font-weight: 650; border-bottom: 1px solid var(--line); }
.scores small { color: var(--quiet); font-weight: 400; }
.scores .interval { color: var(--quiet); font-size: .8rem; }
.change { border-radius: 99px; padding: 0 8px; margin-right: -8px; }
.bars tbody th, .figure { white-space: nowrap; }
.bars .figure { text-align: right; padding-left: 14px; padding-right: 0; font-variant-numeric: tabular-nums; }
.bars small { color: var(--quiet); }
.bars .quiet { color: var(--quiet); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--quiet); }
svg polyline { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.a { --line-colour: var(--a); } .b { --line-colour: var(--b); } .c { --line-colour: var(--c); }
.d { --line-colour: var(--d); } .e { --line-colour: var(--e); } .f { --line-colour: var(--f); }
svg polyline { stroke: var(--line-colour); }
svg circle { fill: var(--line-colour); }
svg .raw { opacity: .28; }
h2 small { float: right; font-weight: 400; font-size: .82rem; color: var(--quiet); line-height: 1.6rem; }
.key { margin-left: 14px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--line-colour); }
.legend { font-size: .9rem; color: var(--quiet); margin-bottom: 12px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 3px 0 0; }
.swatch:not(:first-child) { margin-left: 14px; }
.panels { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.panels .card { padding: 12px; }
.panels.wide { grid-template-columns: minmax(0, 1fr); }
.wide .pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 170px), 1fr)); align-items: start; }
.pictures { display: grid; gap: 8px; grid-template-columns: repeat(3, minmax(0, 1fr)); align-items: end; }
.pictures img { display: block; width: 100%; height: auto; max-height: 260px; object-fit: contain; border-radius: 6px; }
figcaption { font-size: .75rem; color: var(--quiet); text-align: center; margin-top: 3px; }
.caption { display: flex; gap: 12px; align-items: flex-start; justify-content: space-between; margin-top: 8px;
  padding: 0 2px; line-height: 1.4; }
.caption q { min-width: 0; overflow-wrap: anywhere; font-weight: 550; }
.badge { flex: none; font-size: .82rem; font-weight: 600; border-radius: 99px; padding: 1px 10px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.good { color: var(--good); background: var(--good-bg); }
.fair { color: var(--fair); background: var(--fair-bg); }
.poor { color: var(--poor); background: var(--poor-bg); }
dl { display: grid; gap: 12px 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); }
dt { font-size: .8rem; color: var(--quiet); }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
footer { color: var(--quiet); font-size: .92rem; max-width: 46rem; display: grid; gap: 6px; }
footer h2 { color: var(--ink); margin-bottom: 0; }
@media (max-width: 560px) {
  main { padding: 24px 14px 40px; gap: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 14px; }
  .value { font-size: 1.9rem; }
  .card { padding: 14px; }
  svg text { font-size: 15px; }
  .pictures { gap: 5px; }
}
@media print {
  :root { color-scheme: light; --page: #fff; }
  html { font-size: 11px; }
  body { font-size: 12px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { padding: 0; max-width: none; display: block; }
  main > * { margin-bottom: 14px; }
  h2, .legend { break-after: avoid; }
  .panels, .columns { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 10px; }
  .tile { padding: 10px 12px; }
  .scroll { overflow-x: visible; }
  .wide .pictures { grid-template-columns: repeat(auto-fit, minmax(80px, 1fr)); }
}
"""
