"""Write the packaged model `photos` from a finished run:

    python tools/ship_photos.py RUN --data COMPOSED --scores scores.json --out FOLDER

docs/photographs.md has the commands before this one.
"""

import argparse
import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dcris import Segmenter
from dcris.cli import exit_code
from dcris.config import RunConfig, replace
from dcris.data.readers import refer_layout
from dcris.data.readers.load import load_references
from dcris.data.training_table import training_table
from dcris.errors import DcrisError
from dcris.utils.files import remove_directory, write_file

LICENCES = {4: "CC BY 2.0", 5: "CC BY-SA 2.0", 7: "no known copyright restrictions", 8: "work of the US government"}
"""Licences of COCO's `instances.json` under which weights may be shipped."""


def main() -> None:
    """Write model.safetensors, config.json, README.md and photographs.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    segmenter = Segmenter.from_pretrained(args.run, device="cpu")
    rows, with_scenes = photographs(args.data, segmenter.config)
    scores = json.loads(args.scores.read_text(encoding="utf-8"))
    # Neither the precision of training nor the path of the run that it continued is that of other
    # machines.
    changes = {"train.precision": "auto", "train.start": None, "data.refine": "guided"}
    ship(segmenter, "photos", args.out, card(rows, scores, with_scenes), changes)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("coco_id", "licence", "url"), *rows])
    write_file(args.out / "photographs.csv", table.getvalue())


def ship(segmenter: Segmenter, name: str, out: Path, sections: str, changes: dict[str, Any]) -> None:
    """Write model.safetensors, config.json, README.md and training_images.bin of a packaged model.

    Args:
        segmenter: the trained model.
        name: of the packaged model.
        out: the directory; replaced if it exists.
        sections: of the model card, between the description and the licence.
        changes: to the configuration.
    """
    segmenter.config = replace(segmenter.config, changes)
    if out.exists():
        remove_directory(out)
    segmenter.save_pretrained(out, half=True, towers=False, licence="apache-2.0")
    path = out / "README.md"
    text = path.read_text(encoding="utf-8").replace(out.name, name)
    before, _, after = text.partition("## Scores\n")
    write_file(path, before + sections + after[after.index("## Licence") :])


def measures(scores: dict[str, Any]) -> list[str]:
    """Return the first lines of a model card's table of scores."""
    named = (("mIoU", "miou"), ("oIoU", "oiou"), ("Prec@0.5", "prec@0.5"))
    return ["| measure | value |", "|---|---|", *(f"| {name} | {scores[key]:.1f} |" for name, key in named)]


def photographs(root: Path, config: RunConfig) -> tuple[list[tuple[int, int, str]], bool]:
    """Return COCO's id, licence and address of each photograph that the run trained on, and whether
    it trained on generated scenes, too.

    Raises DcrisError for a licence under which weights may not be shipped.
    """
    table = training_table(load_references(root, config.data.dataset, config.data.split_by), config.data)
    instances = refer_layout.read_instances(root, config.data.dataset)
    rows = []
    used = {reference.image_id for reference in table.split(config.data.train_split)}
    # A composed photograph (compose_photos.py) stands for those that it is made of, a generated
    # scene for none.
    sources = [instances.images[number].get("composed_of", [number]) for number in used]
    for image_id in sorted({each for source in sources for each in source}):
        image = instances.images[image_id]
        if image["license"] not in LICENCES:
            raise DcrisError(f"photograph {image_id} has the licence {image['license']}; do not ship this run")
        rows.append((image_id, int(image["license"]), str(image["flickr_url"])))
    return rows, [] in sources


def card(rows: list[tuple[int, int, str]], scores: dict[str, Any], with_scenes: bool) -> str:
    """Return the sections of the model card between the description and the licence."""
    counts, presence = Counter(licence for _, licence, _ in rows), scores["presence"]
    names, others = scores["words"]["names"], scores["words"]["other words"]
    licences = ", ".join(f"{count} {LICENCES[licence]}" for licence, count in sorted(counts.items()))
    groups = [(name, found) for part in ("by_kind", "by_size") for name, found in scores[part].items()]
    return "\n".join(
        [
            "## Data",
            "",
            f"{len(rows)} photographs of COCO, listed in `photographs.csv` with their licences ({licences}), also with",
            f"objects of some pasted into others, {'generated scenes, ' if with_scenes else ''}and phrases generated from",
            "COCO's instance annotations (CC BY 4.0): category, place, size, ordinal, colour, relation. No",
            "photograph of another licence and none of the photographs that it is scored on was used.",
            "",
            "## Scores",
            "",
            f"Protocol cris, {scores['photographs']} other photographs of COCO, {scores['expressions']} templated",
            "expressions, in percent. `tools/measure_photos.py` measures them.",
            "",
            *measures(scores),
            f"| mIoU of {names['expressions']} expressions whose category has other names | {names['miou']:.1f} |",
            f'| the same with each of these ("boy" for "person", "mug" for "cup") | {others["miou"]:.1f} |',
            f"| mIoU with the phrase of another object of the photograph | {scores['exchanged']:.1f} |",
            f"| of several of a kind the right one is hit best | {scores['right_one_best']:.0f} |",
            f"| the same by chance | {scores['chance']:.0f} |",
            f"| AUROC of presence, against {presence['absent']} expressions for absent objects | {presence['auroc']:.1f} |",
            f"| absent objects that are recognised, with a score below 0.5 | {presence['dropped']:.0f} |",
            f"| objects that are found, with a score of at least 0.5 | {presence['kept']:.0f} |",
            *(
                f"| the same, {name} of the photograph | {kept:.0f} |"
                for name, kept in presence["kept_by_size"].items()
            ),
            "",
            f"mIoU on {scores['generated']['expressions']} generated phrases of the same photographs:",
            "",
            "| kind of phrase, or share of the photograph that the object covers | mIoU | phrases |",
            "|---|---|---|",
            *(f"| {name} | {found['miou']:.1f} | {found['expressions']} |" for name, found in groups),
            "",
            "## What it cannot do",
            "",
            "It knows COCO's 80 categories, in the words of its training phrases. Rare words, objects that cover less",
            "than 2% of the photograph, ordinals, relations and long descriptions mostly fail. Of 100 absent objects",
            f"it finds {100 - presence['dropped']:.0f} all the same, and it may not find a thing by a rare word. Man, woman,",
            "boy, girl, child and person mean the same to it.",
            "It is a demonstration that needs no download, not a substitute for a model on DINOv2 and CLIP.",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
