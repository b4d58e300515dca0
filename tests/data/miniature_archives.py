"""Archives of a few tiny pictures in the real formats, for the tests of preparation.

Names, nesting and oddities are those of the published files, as docs/data.md tells them.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
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


def write_file(path: Path, data: bytes | None = None) -> Path:
    """A file, and the folders it needs; a small JPEG where no data are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if data is None else data)
    return path


def objects365_v2(root: Path) -> Path:
    """ROOT as Objects365 v2 unpacks: train/patchN, the two JSON files, names as published."""
    names = {1: "Person", 38: "Moniter/TV", 53: "Bakset", 91: "Ballon", 316: "Formula 1 "}
    images, annotations = [], []
    for number, name in enumerate(
        (
            "v1/patch0/objects365_v1_00000001.jpg",
            "v1/patch8/objects365_v1_00420917.jpg",
            "v2/patch16/objects365_v2_00908726.jpg",  # in the JSON, but not in the patch
            "v2/patch50/objects365_v2_02000000.jpg",
        )
    ):
        image_id = int(name[-12:-4])
        images.append(
            {
                "height": 40,
                "id": image_id,
                "license": 5,
                "width": 60,
                "file_name": f"images/{name}",
                "url": "",
            }
        )
        if number != 2:
            write_file(root / "train" / name.partition("/")[2], jpeg(seed=number))
        for category in names if number == 1 else (1, 53):
            annotations.append(
                {
                    "id": len(annotations),
                    "iscrowd": int(category == 53 and number == 3),
                    "isfake": 0,
                    "area": 300.5,
                    "isreflected": 0,
                    "bbox": [4.5, 3.0000000001, 20.1, 14.95],
                    "image_id": image_id,
                    "category_id": category,
                }
            )
    categories = [{"name": name, "id": number} for number, name in names.items()]
    train = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "zhiyuan_objv2_val.json", {**train, "images": images[:1]})
    return write_json(root / "annotations" / "zhiyuan_objv2_train.json", {**train, "licenses": []})


def objects365_v1(root: Path) -> Path:
    """ROOT as the 2019 release: pictures in train/, categories before images, other ids."""
    names = ("obj365_train_000000255476.jpg", "obj365_train_000000734304.jpg")
    for seed, name in enumerate(names):
        write_file(root / "train" / name, jpeg(seed=seed))
    document = {
        "categories": [
            {"supercategory": "", "id": 216, "name": "hamimelon"},
            {"supercategory": "", "id": 301, "name": "person"},
        ],
        "type": "instances",
        "images": [
            {"width": 60, "height": 40, "file_name": name, "id": int(name[-16:-4])}
            for name in names
        ],
        "licenses": [],
        "info": {"year": "2019"},
        "annotations": [
            {
                "category_id": category,
                "bbox": [10.5, 4.25, 24.75, 20.875],
                "iscrowd": 0,
                "area": 516.19,
                "image_id": 255476,
                "id": number,
            }
            for number, category in enumerate((301, 216))
        ],
    }
    write_json(root / "objects365_val.json", document)
    return write_json(root / "objects365_train.json", document)


def goldg(root: Path) -> tuple[Path, Path]:
    """ROOT with MDETR's two training files, Flickr30k and GQA images, and image_data.json.

    Flickr's sizes are strings; one image entry a caption; VG's `original_id` is a string. Picture
    2354786 of Visual Genome is COCO's 318219, 2331819 is nobody's.
    """
    flickr, vg, coco_name = "2354786.jpg", ("2354786.jpg", "2331819.jpg"), 580957
    write_file(root / "flickr30k_images" / flickr, jpeg(seed=1))
    for seed, name in enumerate(vg):
        write_file(root / "gqa" / "images" / name, jpeg(seed=2 + seed))
    train2014 = f"COCO_train2014_{coco_name:012d}.jpg"
    write_file(root / "train2014" / train2014, jpeg(seed=5))
    write_json(
        root / "image_data.json",
        [
            {
                "width": 60,
                "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{name}",
                "height": 40,
                "image_id": int(name[:-4]),
                "coco_id": 318219 if name == vg[0] else None,
                "flickr_id": None,
            }
            for name in vg
        ],
    )
    captions = ("2 wet boys in blue swimming suits", "Boys wear suits .")
    spans = (([[0, 10]], [[14, 33]]), ([[0, 4]], [[10, 15]]))
    mdetr_annotations = root / "mdetr_annotations"
    flickr_images = [
        {
            "file_name": flickr,
            "height": "40",
            "width": "60",
            "id": number,
            "caption": caption,
            "dataset_name": "flickr",
            "tokens_negative": [[0, len(caption)]],
            "sentence_id": number,
            "original_img_id": int(flickr[:-4]),
            "tokens_positive_eval": [[s] for s in spans[number]],
        }
        for number, caption in enumerate(captions)
    ]
    first = write_json(
        mdetr_annotations / "final_flickr_separateGT_train.json",
        {
            "info": [],
            "licenses": [],
            "images": flickr_images,
            "annotations": _phrase_boxes(spans),
            "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
        },
    )
    mixed_images = [
        {
            "file_name": name,
            "height": 40,
            "width": 60,
            "id": number,
            "original_id": str(original),
            "caption": "one man wearing pink tie.",
            "tokens_negative": [[0, 3], [4, 7], [8, 15]],
            "data_source": source,
            "dataset_name": "mixed",
        }
        for number, (name, original, source) in enumerate(
            (
                (train2014, coco_name, "coco"),
                (vg[0], 2354786, "vg"),
                (vg[1], 2331819, "vg"),
                (vg[1], 2331819, "vg"),
            )
        )
    ]
    second = write_json(
        mdetr_annotations / "final_mixed_train.json",
        {
            "info": [],
            "licenses": [],
            "images": mixed_images,
            "annotations": _phrase_boxes([([[0, 3], [4, 7]], [[16, 24]])] * 4),
            "categories": [],
        },
    )
    return first, second


def _phrase_boxes(spans) -> list[dict]:
    annotations: list[dict] = []
    for image, of_it in enumerate(spans):
        for span in of_it:
            annotations.append(
                {
                    "area": 18419.0,
                    "iscrowd": 0,
                    "image_id": image,
                    "category_id": 1,
                    "id": len(annotations),
                    "bbox": [5.387, 8.56, 30.25, 20],
                    "tokens_positive": span,
                }
            )
    return annotations


def lvis(root: Path) -> tuple[Path, Path]:
    """ROOT with lvis_v1_train.json and lvis_v1_val.json; pictures in train2017 and val2017.

    Annotations stand before images, which have no `file_name`; one val picture is of train2017.
    """
    categories = [
        {
            "image_count": 64,
            "synonyms": ["mouse", "computer_mouse"],
            "def": "a hand-operated device that moves a cursor",
            "id": 704,
            "synset": "mouse.n.04",
            "name": "mouse_(computer_equipment)",
            "frequency": "f",
            "instance_count": 80,
        },
        {
            "image_count": 5,
            "synonyms": ["hot_dog"],
            "def": "a frankfurter in a bun",
            "id": 1,
            "synset": "frank.n.02",
            "name": "hot_dog",
            "frequency": "r",
            "instance_count": 5,
        },
    ]
    paths = []
    for split, places in (
        ("train", ("train2017/000000391895",)),
        ("val", ("val2017/000000397133", "train2017/000000309022", "val2017/000000037777")),
    ):
        images, annotations = [], []
        for number, place in enumerate(places):
            write_file(root / f"{place}.jpg", jpeg(seed=number))
            images.append(
                {
                    "date_captured": "2013-11-14 11:18:45",
                    "id": int(place[-12:]),
                    "license": 3,
                    "height": 40,
                    "width": 60,
                    "flickr_url": "",
                    "coco_url": f"http://images.cocodataset.org/{place}.jpg",
                    "neg_category_ids": [1],
                    "not_exhaustive_category_ids": [],
                }
            )
            annotations.append(
                {
                    "area": 120.5,
                    "id": number + 1,
                    "segmentation": [[5.0, 6.5, 20.25, 6.5, 20.25, 20]],
                    "image_id": int(place[-12:]),
                    "bbox": [5.0, 6.5, 15.25, 13.5],
                    "category_id": 704,
                }
            )
        document = {
            "info": {"description": "LVIS v1", "year": 2020},
            "annotations": annotations[: 1 if split == "train" else 2],  # the last has none
            "images": images,
            "categories": categories,
            "licenses": [{"id": 3, "name": "é"}],
        }
        paths.append(write_json(root / "annotations" / f"lvis_v1_{split}.json", document))
    return paths[0], paths[1]


CLASSES = (  # lines of LOC_synset_mapping.txt
    "n01440764 tench, Tinca tinca",
    "n02012849 crane",
    "n02113186 Cardigan, Cardigan Welsh corgi",
    "n02963159 cardigan",
    "n03126707 crane",
    "n03710637 maillot",
    "n03710721 maillot, tank suit",
)


def imagenet(root: Path) -> Path:
    """ROOT as Kaggle's archive unpacks: two pictures of each of seven classes, one broken."""
    for seed, line in enumerate(CLASSES):
        folder = root / "ILSVRC/Data/CLS-LOC/train" / line[:9]
        for number in (10026, 7):
            write_file(folder / f"{line[:9]}_{number}.JPEG", jpeg(seed=seed + number))
    write_file(folder / f"{line[:9]}_7.JPEG", b"broken")
    write_file(root / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG")
    path = root / "LOC_synset_mapping.txt"
    path.write_text("\n".join((*CLASSES, "n04355933 sunglass", "")), encoding="utf-8")
    return path


def coco2017(root: Path) -> Path:
    """ROOT as COCO unpacks: annotations/ beside train2017/ and val2017/."""
    for split in ("train2017", "val2017"):
        names = [f"{number:012d}.jpg" for number in (9, 25)]
        document = coco(names)
        for seed, (name, entry) in enumerate(zip(names, document["images"])):
            write_file(root / split / name, jpeg(seed=seed))
            entry["coco_url"] = f"http://images.cocodataset.org/{split}/{name}"
        write_json(root / "annotations" / f"instances_{split}.json", document)
    return root / "annotations" / "instances_train2017.json"


def roboflow(root: Path) -> Path:
    """ROOT as Roboflow exports COCO: a JSON beside the pictures of each split."""
    for split in ("train", "valid", "test"):
        names = ["IMG_2277_jpeg_jpg.rf.86c72d6192da48d941ffa957f4780665.jpg", "b_jpg.rf.0f.jpg"]
        for seed, name in enumerate(names):
            write_file(root / split / name, jpeg(seed=seed))
        document = coco(names)
        document["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        write_json(root / split / "_annotations.coco.json", {"info": {"version": "2"}, **document})
    return root / "train" / "_annotations.coco.json"


def shard_entries(count: int = 4, shard: int = 0) -> list[dict]:
    """What img2dataset knows of `count` addresses: the second is dead, the third no image."""
    entries = []
    for number in range(count):
        status = {1: "failed_to_download", 2: "failed_to_resize"}.get(number, "success")
        good = status == "success"
        data = jpeg(seed=100 * shard + number) if good else None
        entries.append(
            {
                "url": f"https://example.org/{shard}/{number}.jpg",
                "caption": f"a small dog number {number} on the grass",
                "key": f"{shard:05d}{number:04d}",
                "status": status,
                "error_message": None if good else "HTTP Error 404: Not Found",
                "width": 60 if good else None,
                "height": 40 if good else None,
                "original_width": 600 if good else None,
                "original_height": 400 if good else None,
                "exif": "{}" if good else None,
                "sha256": hashlib.sha256(data).hexdigest() if good else None,
                "jpg": data,
            }
        )
    return entries


def webdataset(root: Path, entries: list[dict], shard: int = 0, parquet: bool = True) -> Path:
    """A tar as img2dataset writes it, with the parquet and the statistics beside."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{shard:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            if entry["jpg"] is not None:
                for suffix, data in shard_files(entry).items():
                    member = tarfile.TarInfo(f"{entry['key']}.{suffix}")
                    member.size, member.mtime = len(data), 1_700_000_000
                    tar.addfile(member, io.BytesIO(data))
    if parquet:
        write_parquet(path.with_suffix(".parquet"), entries)
    write_json(root / f"{shard:05d}_stats.json", {"count": len(entries), "successes": 2})
    return path


def shard_folder(root: Path, entries: list[dict], shard: int = 0) -> Path:
    """A folder as img2dataset's "files" format has it."""
    for entry in entries:
        if entry["jpg"] is not None:
            for suffix, data in shard_files(entry).items():
                write_file(root / f"{shard:05d}" / f"{entry['key']}.{suffix}", data)
    write_parquet(root / f"{shard:05d}.parquet", entries)
    return root / f"{shard:05d}"


def shard_files(entry: dict) -> dict[str, bytes]:
    """The three files of an entry by their suffixes."""
    metadata = {name: value for name, value in entry.items() if name != "jpg"}
    return {
        "jpg": entry["jpg"],
        "txt": (entry["caption"] or "").encode(),
        "json": json.dumps(metadata, indent=4).encode(),
    }


def write_parquet(path: Path, entries: list[dict], *, images: bool = False) -> Path:
    """The parquet of a shard, in row groups of 3; with `images`, img2dataset's parquet format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: v for k, v in entry.items() if images or k != "jpg"} for entry in entries]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path
