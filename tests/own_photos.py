"""A folder of own photos, and recipes with a tiny model, for the roads of docs/."""

import json

import numpy as np
import tiny_run
from PIL import Image

from detclipv2_jax import prepare as prepare_door
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes

COLORS = {
    "raccoon": (200, 30, 30),
    "apple": (200, 30, 30),
    "leaf": (30, 160, 60),
    "sky": (40, 80, 220),
}


def make_photos(folder, count=24, names=("apple",)):
    """A folder of own photos: each shows one rectangle per name, in its color."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    for number in range(count):
        pixels = generator.integers(90, 160, (48, 64, 3), dtype=np.uint8)
        for category, name in enumerate(names):
            x, y = generator.integers(0, 40), generator.integers(0, 24)
            pixels[y : y + 20, x : x + 20] = COLORS[name]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [int(x), int(y), 20, 20],
                }
            )
        Image.fromarray(pixels).save(folder / f"images/{number}.jpg", quality=95)
        content["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64}
        )
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))
    return folder


TINY = {
    name: value
    for name, value in tiny_run.OVERRIDES.items()
    if name.startswith("model.") or name in ("eval.pre_nms_top_k", "eval.max_detections")
} | {
    "data.detection.batch_size": 4,
    "data.detection.shapes": ((64, 64),),
    "data.detection.table_size": 32,
    "data.detection.concepts_per_image": 8,
    "eval.canvas": (64, 64),
    "eval.batch_size": 4,
    "eval.pictures": 2,
    "train.epochs": 3.0,
}


def tiny(recipe, size, **fields):
    """The config of a shipped recipe at a size, with a tiny model; fields with __ for dots."""
    values = recipes.load(recipe).get_config(size)
    for name, value in (TINY | {k.replace("__", "."): v for k, v in fields.items()}).items():
        section, _, field = name.rpartition(".")
        place = values
        for part in filter(None, section.split(".")):
            place = place[part]
        place[field] = value
    return config_lib.parse(values.to_dict())


def prepared(origin, to, *flags):
    assert prepare_door.main(["custom", f"--from={origin}", f"--to={to}", "--jobs=1", *flags]) == 0
    return to
