"""Measure a model on the photographs of a data set in the REFER layout:
`python tools/measure_photos.py photos --data ROOT --splits val testA --out scores.json`.

Printed and written, in percent, over the expressions of all splits together:

- mIoU, oIoU and precisions of the protocol cris;
- the mIoU when each object is given the expressions of another object of its photograph;
- of several of a kind: how often the predicted mask overlaps the right object best, and how often
  chance would;
- mIoU by kind of generated phrase, and by size of the object;
- the same with other words for the category of the object ("left man" for "left person");
- of a model with a presence head: the AUROC of presence against expressions of other photographs
  whose object is absent, and the shares of both for which its answer is right.

`--splits train --licences 1 2 3 6 --short` measures it on training photographs whose licences keep
them out of the training of `photos`: its settings are chosen on these, never on val and testA.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.checkpoints.resolve import locate
from dcris.cli import exit_code
from dcris.config import DataConfig, NegativesConfig
from dcris.data.dataset import all_queries
from dcris.data.masks import decode_mask, union_area, union_mask
from dcris.data.phrases import NOUNS
from dcris.data.readers import refer_layout
from dcris.data.readers.load import load_references
from dcris.data.readers.refer_layout import Instances
from dcris.data.table import ReferenceTable
from dcris.data.training_table import training_table
from dcris.errors import DcrisError
from dcris.evaluation.confidence import auroc
from dcris.evaluation.evaluator import EvalResult, exchange_expressions, predict_queries
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Cris
from dcris.inference.prediction import LEAST_PRESENCE
from dcris.types import Expression, Reference
from dcris.utils.files import write_json

SIZES = {"under 2%": (0, 0.02), "2 to 10%": (0.02, 0.1), "above 10%": (0.1, 1)}
"""Shares of the photograph."""

WORDS = {**NOUNS, "person": ("person", "human", "man", "woman", "guy", "lady", "boy", "girl", "kid", "child")}
"""Words for categories; those for people are the ones that `photos` was trained with."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="cocomini")
    parser.add_argument("--splits", nargs="+", default=["val", "testA"])
    parser.add_argument("--licences", type=int, nargs="+", help="only photographs with these numbers in instances.json")
    parser.add_argument("--short", action="store_true", help="neither exchanged nor generated phrases")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, config = load_checkpoint(locate(args.model))
    table = load_references(args.data, args.dataset)
    instances = refer_layout.read_instances(args.data, args.dataset)

    def wanted(references: Iterable[Reference]) -> list[Reference]:
        licences = args.licences
        return [each for each in references if not licences or instances.images[each.image_id]["license"] in licences]

    references = wanted(reference for split in args.splits for reference in table.split(split))
    if not references:
        parser.error("no photograph of these splits has one of these licences")

    def predict(queries: list[tuple[Reference, Expression]]) -> list[EvalResult]:
        return list(predict_queries(model, queries, config, Cris(), device="cpu"))

    own = predict(all_queries(references))
    scores: dict[str, Any] = summary(own) | {
        "photographs": len({reference.image_id for reference in references}),
        **several_of_a_kind(own, instances),
    }
    if config.model.head.presence:
        absent = DataConfig(negatives=NegativesConfig(share=0.5))
        scores["presence"] = presence(own, predict(all_queries(wanted(made(table, args.splits, absent)))))
    scores["words"] = by_word(own, predict([*in_other_words(references)]))
    if not args.short:
        phrases = DataConfig(generate_phrases=True)
        generated = predict(all_queries(wanted(made(table, args.splits, phrases))))
        scores |= {
            "exchanged": summary(predict(exchange_expressions(references)))["miou"],
            "generated": summary(generated),
            "by_kind": grouped(generated, lambda result: str(result.expression.kind)),
            "by_size": grouped(generated, size),
        }
    write_json(args.out, scores)
    for name, value in scores.items():
        print(f"{name:20} {value}")


def summary(results: Iterable[EvalResult]) -> dict[str, Any]:
    """Return the metrics in percent, rounded, and the number of expressions."""
    results = list(results)
    found = summarise(result.overlap for result in results)
    return {name: None if value is None else round(value, 2) for name, value in found.items()} | {
        "expressions": len(results)
    }


def grouped(results: Iterable[EvalResult], name: Any) -> dict[str, dict[str, Any]]:
    """Return mIoU and number of expressions of each group."""
    groups: dict[str, list[EvalResult]] = defaultdict(list)
    for result in results:
        groups[name(result)].append(result)
    summaries = {name: summary(group) for name, group in sorted(groups.items())}
    return {name: {key: found[key] for key in ("miou", "expressions")} for name, found in summaries.items()}


def in_other_words(references: Iterable[Reference]) -> Iterator[tuple[Reference, Expression]]:
    """Yield expressions that contain the name of their category with each other word in its place;
    the word is their kind."""
    for reference in references:
        category = reference.category
        for expression in reference.expressions:
            for word in dict.fromkeys(WORDS.get(category, ())):
                text, found = re.subn(rf"\b{re.escape(category)}\b", word, expression.text)
                if found and word != category:
                    yield reference, replace(expression, text=text, kind=word)


def by_word(own: Iterable[EvalResult], others: Sequence[EvalResult]) -> dict[str, dict[str, Any]]:
    """Return mIoU, number of expressions and share found: with the names of the categories, with
    other words, and with each of these."""
    named = {(each.reference.ref_id, each.expression.sent_id): each for each in own}
    same = [named[key] for key in {(each.reference.ref_id, each.expression.sent_id): None for each in others}]
    groups = {"names": same, "other words": [*others]}
    for result in others:
        groups.setdefault(str(result.expression.kind), []).append(result)
    return {
        word: {key: summary(group)[key] for key in ("miou", "expressions")}
        | {"kept": share_kept([float(each.present or 0) for each in group])}
        for word, group in groups.items()
    }


def share_kept(scores: Sequence[float]) -> float:
    """Return the share in percent of scores that keep their mask."""
    return round(100 * float(np.mean(np.array(scores) >= LEAST_PRESENCE)), 1)


def size(result: EvalResult) -> str:
    """Return the group of the object's share of its photograph."""
    reference = result.reference
    share = union_area(reference.segmentations, reference.image_size) / math.prod(reference.image_size)
    return next(name for name, (low, high) in SIZES.items() if low <= share <= high)


def presence(own: Iterable[EvalResult], absent: Iterable[EvalResult]) -> dict[str, Any]:
    """Return the AUROC of presence, and the shares in percent that a minimum of 0.5 keeps of the
    objects of each size, and drops of the absent ones."""
    groups: dict[str, list[float]] = defaultdict(list)
    for result in own:
        groups[size(result)].append(float(result.present or 0))
    there, missing = [*chain.from_iterable(groups.values())], [float(result.present or 0) for result in absent]
    area = auroc(np.array(there + missing), np.array([True] * len(there) + [False] * len(missing)))

    return {
        "auroc": round(100 * (area or 0), 1),
        "dropped": round(100 - share_kept(missing), 1),
        "kept": share_kept(there),
        "kept_by_size": {name: share_kept(groups[name]) for name in SIZES if name in groups},
        "absent": len(missing),
    }


def made(table: ReferenceTable, splits: Iterable[str], config: DataConfig) -> Iterator[Reference]:
    """Yield the references that training with these settings on these splits would add."""
    before = {reference.ref_id for reference in table.references}
    for split in splits:
        # Phrases are also generated on photographs without references, which are in no split;
        # training uses them.
        images = {reference.image_id for reference in table.split(split)}
        extended = training_table(table, config.model_copy(update={"train_split": split}))
        yield from (each for each in extended.references if each.ref_id not in before and each.image_id in images)


def several_of_a_kind(results: Iterable[EvalResult], instances: Instances) -> dict[str, Any]:
    """Return how often, among objects of one category in a photograph, the prediction overlaps the
    right one best."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in instances.annotations.values():
        by_image[annotation["image_id"]].append(annotation)
    hits, chances = [], []
    for result in results:
        reference = result.reference
        category = instances.annotations[reference.ann_ids[0]]["category_id"]
        rivals = [
            other
            for other in by_image[reference.image_id]
            if other["category_id"] == category and other["id"] not in reference.ann_ids and not other.get("iscrowd")
        ]
        if not rivals:
            continue
        predicted = result.mask()

        def iou(mask: np.ndarray, predicted: np.ndarray = predicted) -> float:
            return float((predicted & mask).sum() / max(1, (predicted | mask).sum()))

        right = iou(union_mask(reference.segmentations, reference.image_size).astype(bool))
        others = []
        for other in rivals:
            try:
                others.append(iou(decode_mask(other["segmentation"], reference.image_size).astype(bool)))
            except DcrisError:
                continue
        hits.append(right > 0 and all(right > value for value in others))
        chances.append(1 / (1 + len(others)))
    if not hits:
        return {"several_of_a_kind": 0}
    return {
        "several_of_a_kind": len(hits),
        "right_one_best": round(100 * float(np.mean(hits)), 1),
        "chance": round(100 * float(np.mean(chances)), 1),
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
