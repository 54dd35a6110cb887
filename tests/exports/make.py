"""Make the exports in this folder by the tools' own programs.

They are no dependencies of the tests. Each tool in an environment of its own
(tests/tool_environments.py), here that of Label Studio:

    pip install label-studio==1.23.2
    python tests/exports/make.py label_studio
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


def labelme() -> None:
    """One file for each image, by labelme's `LabelFile.save`; masks by its own PNG encoder."""
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    from annotation_tools import without_window

    without_window()
    from labelme._label_file import LabelFile
    from labelme.utils import img_arr_to_b64

    (HERE / "labelme").mkdir(exist_ok=True)
    for number in (1, 2):
        shapes: list[dict[str, Any]] = []
        for item in OBJECTS:
            if item.image != f"{number}.png":
                continue
            shape: dict[str, Any] = {"label": item.category, "group_id": None, "description": item.phrase, "flags": {}}
            if item.polygon:
                shape |= {"shape_type": "polygon", "points": [list(map(float, point)) for point in item.polygon]}
                shape["mask"] = None
            else:
                rows, columns = np.nonzero(item.mask)
                top, bottom, left, right = (int(each) for each in (min(rows), max(rows), min(columns), max(columns)))
                part = item.mask[top : bottom + 1, left : right + 1].astype(bool)
                shape |= {"shape_type": "mask", "points": [[left, top], [right, bottom]], "mask": img_arr_to_b64(part)}
            shapes.append(shape)
        LabelFile().save(str(HERE / f"labelme/{number}.json"), shapes, f"{number}.png", HEIGHT, WIDTH)


def supervisely() -> None:
    """A project with a data set, by Supervisely's SDK."""
    import supervisely as sly

    classes = sly.ObjClassCollection([sly.ObjClass(name, sly.AnyGeometry) for name in ("cup", "ring")])
    tag = sly.TagMeta("phrase", sly.TagValueType.ANY_STRING)
    meta = sly.ProjectMeta(classes, sly.TagMetaCollection([tag]))
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name, "images"))
        project = sly.Project(f"{name}/project", sly.OpenMode.CREATE)
        project.set_meta(meta)
        data = project.create_dataset("ds")
        for number in (1, 2):
            labels = []
            for item in OBJECTS:
                if item.image != f"{number}.png":
                    continue
                if item.polygon:
                    (shape,) = sly.Bitmap(item.mask.astype(bool)).to_contours()
                else:
                    shape = sly.Bitmap(item.mask.astype(bool))
                tags = sly.TagCollection([sly.Tag(tag, item.phrase)])
                labels.append(sly.Label(shape, meta.get_obj_class(item.category), tags))
            annotation = sly.Annotation((HEIGHT, WIDTH), labels)
            data.add_item_file(f"{number}.png", f"{name}/images/{number}.png", annotation)
        shutil.rmtree(HERE / "supervisely", ignore_errors=True)
        for path in Path(name, "project").rglob("*.json"):
            target = HERE / "supervisely" / path.relative_to(Path(name, "project"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def fiftyone() -> None:
    """COCO by FiftyOne's exporter, one object after the other: its data sets need MongoDB."""
    from fiftyone import Detection, Detections, ImageMetadata
    from fiftyone.utils.coco import COCODetectionDatasetExporter

    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name, "images"))
        exporter = COCODetectionDatasetExporter(
            export_dir=f"{name}/out", classes=["cup", "ring"], extra_attrs=["caption"], export_media=True
        )
        with exporter:
            for number in (1, 2):
                found = []
                for item in OBJECTS:
                    if item.image != f"{number}.png":
                        continue
                    rows, columns = np.nonzero(item.mask)
                    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                    box = [left / WIDTH, top / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT]
                    part = item.mask[top:bottom, left:right].astype(bool)
                    found.append(Detection(label=item.category, bounding_box=box, mask=part, caption=item.phrase))
                size = ImageMetadata(width=WIDTH, height=HEIGHT)
                exporter.export_sample(f"{name}/images/{number}.png", Detections(detections=found), metadata=size)
        content = json.loads(Path(name, "out/labels.json").read_text())
    (HERE / "fiftyone_coco.json").write_text(json.dumps(content, indent=1) + "\n")


def roboflow() -> None:
    """COCO and YOLO by supervision, the library of Roboflow; it has no texts."""
    import supervision

    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name, "images"))
        images = [f"{name}/images/{number}.png" for number in (1, 2)]
        found = {}
        for path in images:
            items = [item for item in OBJECTS if item.image == Path(path).name]
            masks = np.array([item.mask.astype(bool) for item in items])
            classes = np.array([("cup", "ring").index(item.category) for item in items])
            found[path] = supervision.Detections(supervision.mask_to_xyxy(masks), mask=masks, class_id=classes)
        data = supervision.DetectionDataset(["cup", "ring"], images, found)
        data.as_coco(None, f"{name}/coco.json")
        shutil.copy(f"{name}/coco.json", HERE / "roboflow_coco.json")
        shutil.rmtree(HERE / "roboflow_yolo", ignore_errors=True)
        data.as_yolo(None, str(HERE / "roboflow_yolo/train/labels"), str(HERE / "roboflow_yolo/data.yaml"))


MAKERS = {each.__name__: each for each in (label_studio, datumaro, labelme, supervisely, fiftyone, roboflow)}

if __name__ == "__main__":
    for each in sys.argv[1:]:
        MAKERS[each]()
