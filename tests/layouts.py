"""Write the REFER data of a test in the other layouts."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from dcris.data.coco import CATEGORIES
from dcris.data.masks import union_mask
from dcris.data.table import ReferenceTable

HUB_SPLITS = {"train": "train", "val": "validation", "testA": "test", "testB": "testB", "test": "test"}


def write_prepared(table: ReferenceTable, root: Path, folder: str) -> None:
    """Write what CRIS's tools/data_process.py writes: JSON by split, masks of 0 and 255."""
    (root / "anns" / folder).mkdir(parents=True)
    (root / "masks" / folder).mkdir(parents=True)
    numbers = {name: number for number, name in enumerate(CATEGORIES.values())}
    for split in table.splits():
        entries = []
        for reference in table.split(split):
            sentences = [
                {"idx": place, "sent_id": expression.sent_id, "sent": expression.text.strip()}
                for place, expression in enumerate(reference.expressions)
            ]
            entries.append(
                {
                    "bbox": [0, 0, 1, 1],
                    "cat": numbers[reference.category],
                    "segment_id": reference.ref_id,
                    "img_name": reference.image_path.name,
                    "sentences": sentences,
                    "sentences_num": len(sentences),
                }
            )
            mask = union_mask(reference.segmentations, reference.image_size)
            Image.fromarray(mask * 255).save(root / "masks" / folder / f"{reference.ref_id}.png")
        (root / "anns" / folder / f"{split}.json").write_text(json.dumps(entries))


def hub_rows(references: list[dict[str, Any]], instances: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Convert REFER's files to rows of jxu124's repositories, by the name of the split."""
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    rows: dict[str, list[dict[str, Any]]] = {}
    for reference in references:
        image = images[reference["image_id"]]
        sentences = [
            {key: sentence[key] for key in ("raw", "sent", "sent_id", "tokens")} for sentence in reference["sentences"]
        ]
        row = {key: reference[key] for key in ("sent_ids", "ann_id", "ref_id", "image_id", "split", "category_id")}
        row |= {
            "file_name": f"{Path(image['file_name']).stem}_{reference['ann_id']}.jpg",
            "sentences": sentences,
            "raw_anns": json.dumps(annotations[reference["ann_id"]]),
            "raw_image_info": json.dumps(image),
            "raw_sentences": json.dumps(sentences),
            "image_path": f"coco/train2014/{image['file_name']}",
            "bbox": [0.0, 0.0, 1.0, 1.0],
            "captions": [sentence["sent"] for sentence in sentences],
            "global_image_id": f"coco.{image['id']}",
            "anns_id": f"refcoco.{reference['ann_id']}",
        }
        rows.setdefault(HUB_SPLITS[reference["split"]], []).append(row)
    return rows


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return the content of a Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def hub_files(references: list[dict[str, Any]], instances: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a repository such as jxu124/refcoco."""
    return {
        f"data/{split}-00000-of-00001-0123456789abcdef.parquet": parquet(rows)
        for split, rows in hub_rows(references, instances).items()
    }
