"""Makes the folder of docs/results/finetune: scenes of `symbols` where 20 novel names are boxed.

    python docs/results/finetune/make_target.py data/symbols/archives fresh/archives my_photos

The first archive's validation set is the one to measure on, the second's, of another seed, becomes
the folder to fine-tune on: 20 of the 45 names that pre-training never boxed are boxed there, and
nothing else is. Writes my_photos/annotations/instances_train.json, my_photos/images and, beside
them, val.json (the 20 names alone, COCO's format) and zero_shot.json (all names, in the groups
target, base and novel, the other 25).
"""

import json
import shutil
import sys
from pathlib import Path


def chosen(content: dict, ids: set[int], empty: bool) -> dict:
    """A COCO-format set with these categories alone; images without them where `empty`."""
    annotations = [a for a in content["annotations"] if a["category_id"] in ids]
    here = {a["image_id"] for a in annotations}
    fields = ("id", "file_name", "height", "width")
    return {
        "images": [
            {field: image[field] for field in fields}
            for image in content["images"]
            if empty or image["id"] in here
        ],
        "categories": [
            {"id": c["id"], "name": c["name"]} for c in content["categories"] if c["id"] in ids
        ],
        "annotations": [a | {"iscrowd": 0} for a in annotations],
    }


def main() -> None:
    """Writes the folder."""
    old, fresh, to = map(Path, sys.argv[1:])
    val = json.loads((old / "annotations/lvis_val.json").read_text())
    train = json.loads((fresh / "annotations/lvis_val.json").read_text())
    novel = [c["id"] for c in val["categories"] if c["group"] == "novel"]
    counts = {id: sum(a["category_id"] == id for a in val["annotations"]) for id in novel}
    target = set(sorted(novel, key=counts.get, reverse=True)[::2][:20])
    for category in val["categories"]:
        if category["id"] in target:
            category["group"] = "target"
    (to / "annotations").mkdir(parents=True)
    shutil.copytree(fresh / "images/val", to / "images")
    files = {
        "annotations/instances_train.json": chosen(train, target, empty=False),
        "val.json": chosen(val, target, empty=True),
        "zero_shot.json": val,
    }
    for name, content in files.items():
        (to / name).write_text(json.dumps(content))
        print(f"{to / name}: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    main()
