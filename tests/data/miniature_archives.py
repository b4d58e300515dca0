"""Archives of a few tiny pictures in the real formats, for the tests of preparation."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height: int = 40, width: int = 60, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(height: int = 40, width: int = 60, seed: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    picture(height, width, seed).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_images(folder: Path, count: int = 3, height: int = 40, width: int = 60) -> list[str]:
    """Pictures 0.jpg, 1.jpg … in folder/images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / "images" / name).write_bytes(jpeg(height, width, seed=i))
    return names


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def image_entries(names: list[str], height: int = 40, width: int = 60, **more) -> list[dict]:
    return [
        {"id": i, "file_name": name, "height": height, "width": width, **more}
        for i, name in enumerate(names)
    ]


def coco(names: list[str]) -> dict:
    """A box of two categories on every image but the last, which is empty; one crowd box."""
    annotations = []
    for i in range(len(names) - 1):
        for category in (3, 7):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": category,
                    "bbox": [5.0 * category / 3, 4, 20, 10.5],
                    "iscrowd": 0,
                }
            )
    annotations.append({**annotations[0], "id": 99, "iscrowd": 1})
    categories = [
        {"id": 3, "name": "Cat"},
        {"id": 7, "name": "Traffic  Light"},
        {"id": 9, "name": "bus"},
    ]
    return {"images": image_entries(names), "annotations": annotations, "categories": categories}


def mdetr(names: list[str]) -> dict:
    """Each image twice, with the captions "The red cat near two dogs" and "they see a CAT"."""
    images, annotations = [], []
    for name in names:
        for caption, spans in (
            ("The red cat near two dogs", [[[0, 11]], [[17, 25]], [[4, 7], [21, 25]]]),
            ("they see a CAT", [[[9, 14]]]),
        ):
            image = {"id": len(images), "file_name": name, "caption": caption}
            images.append({**image, "height": "40", "width": "60"})
            for span in spans:
                annotation = {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "bbox": [1, 2, 30, 20],
                }
                annotations.append({**annotation, "tokens_positive": span})
    return {"images": images, "annotations": annotations, "categories": []}
