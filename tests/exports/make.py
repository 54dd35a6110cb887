"""Make the exports in this folder by the tools' own programs.

They are no dependencies of the tests. In an environment of their own:

    pip install label_studio_sdk==2.1.2 datumaro==1.13.12 pycocotools
    python tests/exports/make.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from annotated import HEIGHT, OBJECTS, WIDTH, write_images  # noqa: E402

CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="brush" toName="image"><Label value="cup"/><Label value="ring"/></BrushLabels>
<PolygonLabels name="polygon" toName="image"><Label value="cup"/><Label value="ring"/></PolygonLabels>
<RectangleLabels name="box" toName="image"><Label value="cup"/></RectangleLabels>
<TextArea name="phrase" toName="image" perRegion="true"/></View>"""


def tasks() -> list[dict[str, Any]]:
    """Label Studio's tasks as its JSON export has them; brush strokes are encoded by its SDK."""
    from label_studio_sdk.converter.brush import mask2rle

    made = []
    for number in (1, 2):
        results: list[dict[str, Any]] = []
        for place, item in enumerate(OBJECTS):
            if item.image != f"{number}.png":
                continue
            common = {"id": f"r{place}", "to_name": "image", "origin": "manual", "image_rotation": 0}
            common |= {"original_width": WIDTH, "original_height": HEIGHT}
            if item.polygon:
                points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in item.polygon]
                value: dict[str, Any] = {"points": points, "closed": True}
                kind = "polygon"
            else:
                value, kind = {"format": "rle", "rle": mask2rle(item.mask * np.uint8(255))}, "brush"
            labels = f"{kind}labels"
            results.append({**common, "type": labels, "from_name": kind, "value": {**value, labels: [item.category]}})
            said = {**value, "text": [item.phrase]}
            results.append({**common, "type": "textarea", "from_name": "phrase", "value": said})
        annotation = {"id": 100 + number, "result": results, "was_cancelled": False, "completed_by": 1}
        annotation |= {
            "ground_truth": False,
            "created_at": "2026-11-29T10:00:00Z",
            "updated_at": "2026-11-29T10:00:00Z",
        }
        annotation |= {"lead_time": 3.5}
        image = f"/data/upload/1/0a1b2c3{number}-{number}.png"
        made.append({"id": number, "data": {"image": image}, "annotations": [annotation], "predictions": []})
    return made


def label_studio() -> None:
    """JSON; and JSON-MIN and COCO as Label Studio's own converter makes them of it."""
    from label_studio_sdk.converter import Converter

    (HERE / "label_studio.json").write_text(json.dumps(tasks(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        converter = Converter(config=CONFIG, project_dir=name, upload_dir=name, download_resources=False)
        converter.convert_to_json_min(str(HERE / "label_studio.json"), str(work / "min"), is_dir=False)
        shutil.copy(work / "min/result.json", HERE / "label_studio_min.json")
        converter.convert_to_coco(str(HERE / "label_studio.json"), str(work / "coco"), is_dir=False)
        shutil.copy(work / "coco/result.json", HERE / "label_studio_coco.json")


def datumaro() -> None:
    """Datumaro's own format, and COCO as it writes it for CVAT: brush masks are crowds."""
    from datumaro.components.annotation import AnnotationType, LabelCategories, Mask, Polygon
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image

    names = ["cup", "ring"]
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        items = []
        for number in (1, 2):
            found: list[Any] = []
            for item in OBJECTS:
                if item.image != f"{number}.png":
                    continue
                common: dict[str, Any] = {"label": names.index(item.category), "id": len(found) + 1}
                common |= {"attributes": {"phrase": item.phrase, "occluded": False}, "group": len(found) + 1}
                if item.polygon:
                    found.append(Polygon([value for point in item.polygon for value in point], **common))
                else:
                    found.append(Mask(item.mask.astype(bool), **common))
            media = Image.from_file(path=f"{folder}/{number}.png")
            items.append(DatasetItem(id=str(number), subset="train", media=media, annotations=found))
        categories = {AnnotationType.label: LabelCategories.from_iterable(names)}
        data = Dataset.from_iterable(items, categories=categories, media_type=Image)
        for form, name in (("datumaro", "datumaro.json"), ("coco_instances", "datumaro_coco.json")):
            data.export(f"{folder}/{form}", form, save_media=False)
            (written,) = Path(folder, form).rglob("*train.json")
            content = json.loads(written.read_text().replace(f"{folder}/", ""))
            (HERE / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    label_studio()
    datumaro()
