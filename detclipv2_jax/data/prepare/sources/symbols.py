"""The built-in data: an open-vocabulary world of pictographs, drawn from a seed in a minute.

It comes in the formats that real data has, so it goes through the same readers: COCO instances
JSON for detection, MDETR's JSON for grounding, JSON lines of captions, and an LVIS v1 JSON to
validate on. A share of the symbols is *novel*: they occur in captions and in validation, and never
under a box that is trained on.

    DIR/images/{detection,grounding,image_text,val}/000000001.jpg
    DIR/annotations/detection_train.json     COCO; its categories are the base symbols
    DIR/annotations/grounding_train.json     MDETR; one image entry a caption
    DIR/annotations/image_text_train.jsonl   {"file_name": ..., "captions": [...]}
    DIR/annotations/lvis_val.json            LVIS v1; base and novel, all boxed
    DIR/annotations/symbols.json             for people: the symbols, the options and the seed

Every `file_name` is relative to the image folder of its own kind.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import symbols_captions as captions
from detclipv2_jax.data.prepare.sources import symbols_scenes as scenes

SPLITS = ("detection", "grounding", "image_text", "val")
RARE, COMMON = 10, 100  # LVIS: a category in at most so many training images is rare, common

_SECOND_CAPTION = 0.3  # share of the grounding pictures that have two captions
_NOT_EXHAUSTIVE = 0.1  # share of the validation pictures that list a category as such
_FITS = 0.7  # of a canvas, the long side that fits at any rotation
_CHUNK = 50  # scenes a task of the process pool


@dataclasses.dataclass(frozen=True)
class SymbolsOptions:
    """Size, difficulty and the split of concepts. Lengths in pixels, shares as fractions of one."""

    detection_scenes: int = 7600
    grounding_scenes: int = 1200
    image_text_scenes: int = 9600
    val_scenes: int = 500
    canvas: int = 128  # longer side of a boxed scene; the shorter one is 0.8 to 1.0 of it
    caption_canvas: int = 64  # side of a captioned scene
    objects: tuple[int, int] = (2, 5)  # in a boxed scene
    caption_objects: tuple[int, int] = (1, 1)  # in a captioned scene
    # Long side before rotation; at most 0.7 of a canvas, so that it fits at any rotation.
    symbol_size: tuple[float, float] = (40.0, 60.0)
    rotation: float = 15.0  # degrees either way
    overlap: float = 0.1  # of the smaller of two boxes that may lie under the other
    difficulty: float = 0.1  # of the background: 0 soft, 1 garish
    color_share: float = 0.4  # of the phrases that name the color
    novel: int = 45  # symbols that never get a training box
    novel_share: float = 0.35  # of the objects in captioned scenes that are novel
    split_seed: int = 2  # of base and novel; apart from `seed`, so that the split stays
    negatives: int = 20  # categories a validation image lists as absent
    jpeg_quality: int = 92

    def __post_init__(self):
        total = len(scenes.load_symbols())
        smallest_side = min(int(0.8 * self.canvas), self.caption_canvas)
        checks = {
            "novel": 0 <= self.novel < total,
            "novel_share": 0 <= self.novel_share <= 1,
            "objects": 1 <= self.objects[0] <= self.objects[1],
            "caption_objects": 1 <= self.caption_objects[0] <= self.caption_objects[1],
            "symbol_size": 8 <= self.symbol_size[0] <= self.symbol_size[1]
            and self.symbol_size[0] <= _FITS * smallest_side,
            "overlap": 0 <= self.overlap <= 1,
            "difficulty": 0 <= self.difficulty <= 1,
            "color_share": 0 <= self.color_share <= 1,
            "jpeg_quality": 1 <= self.jpeg_quality <= 100,
            "negatives": self.negatives >= 0,
            **{f"{split}_scenes": self.scenes(split) >= 0 for split in SPLITS},
        }
        for field, fine in checks.items():
            if not fine:
                raise UserError(
                    f"SymbolsOptions.{field} = {getattr(self, field)} makes no sense for {total} "
                    f"symbols on canvases of {self.canvas} and {self.caption_canvas} pixels: see "
                    "the defaults in detclipv2_jax/data/prepare/sources/symbols.py."
                )

    def scenes(self, split: str) -> int:
        """Number of scenes of one of `SPLITS`."""
        return int(getattr(self, f"{split}_scenes"))


@dataclasses.dataclass(frozen=True)
class Example:
    """One finished scene: what is in it and what is said of it (nothing in detection and val)."""

    file_name: str
    scene: scenes.Scene
    captions: tuple[captions.Caption, ...]


def generate(
    to: str | os.PathLike,
    *,
    seed: int = 0,
    processes: int = 2,
    options: SymbolsOptions | None = None,
) -> None:
    """Draws all pictures and writes all annotations into the new directory `to`.

    The outcome depends on `seed` and `options` alone, not on `processes`. It is written beside `to`
    and renamed when complete. If `to` already holds the same, nothing is done.

    Raises `UserError` if `to` is there and holds anything else.
    """
    options = options or SymbolsOptions()
    to = Path(to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        _check_same(to, seed, options)
        return
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in SPLITS:
        (partial / "images" / split).mkdir(parents=True)
    (partial / "annotations").mkdir()
    examples = _draw_all(partial, seed, options, processes)
    _write_annotations(partial / "annotations", seed, options, examples)
    os.replace(partial, to)


def symbol_groups(options: SymbolsOptions) -> tuple[list[int], list[int]]:
    """Positions in `load_symbols()` of the base and of the novel symbols, ascending."""
    symbols = scenes.load_symbols()
    novel = scenes.novel_symbols(symbols, options.novel, options.split_seed)
    return [i for i in range(len(symbols)) if i not in novel], sorted(novel)


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one scene: a stream of its own for every (seed, split, index)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    return np.random.Generator(np.random.PCG64(sequence))


def symbol_chances(split: str, options: SymbolsOptions) -> Float[np.ndarray, " s"]:
    """How likely each symbol is in the scenes of a split; they sum to one.

    Boxed training scenes have base symbols with a long tail: of 190, 8 in a handful of images
    (rare), 25 in some tens (common), the rest alike. Captioned scenes share `novel_share` evenly
    among the novel and the rest evenly among the base symbols. Validation has all evenly.
    """
    base, novel = symbol_groups(options)
    chances = np.zeros(len(base) + len(novel))
    if split == "val":
        chances[:] = 1
    elif split == "image_text":
        share = options.novel_share if novel else 0.0
        chances[novel] = share / max(1, len(novel))
        chances[base] = (1 - share) / len(base)
    else:
        scenes_boxed = max(1, options.detection_scenes + options.grounding_scenes)
        boxes = scenes_boxed * sum(options.objects) / 2
        chances[base] = _long_tail(len(base), boxes / len(base), options.split_seed)
    return chances / chances.sum()


def _long_tail(count: int, mean: float, seed: int) -> Float[np.ndarray, " count"]:
    """Expected boxes of each of `count` symbols, `mean` on average; chance picks the tail."""
    rare, common = round(0.042 * count), round(0.13 * count)
    boxes = np.full(count, mean)
    # Well inside LVIS's bounds of 10 and 100 images, so that chance does not carry many over.
    boxes[:rare] = np.minimum(mean, np.geomspace(2, 6, rare))
    boxes[rare : rare + common] = np.minimum(mean, np.geomspace(14, 70, common))
    boxes[rare + common :] *= 1 + (mean * count - boxes.sum()) / boxes[rare + common :].sum()
    return np.random.Generator(np.random.PCG64([seed, count])).permutation(boxes)


def make_example(
    seed: int, split: str, index: int, options: SymbolsOptions, chances: np.ndarray | None = None
) -> tuple[Example, Image.Image]:
    """Scene number `index` of a split, as a pure function of its arguments, and its RGB picture.

    `chances` is `symbol_chances(split, options)`, for callers that make many.
    """
    rng = scene_generator(seed, split, index)
    captioned = split == "image_text"
    canvas = options.caption_canvas if captioned else options.canvas
    height = width = canvas
    if not captioned and (shape := rng.integers(3)):
        shorter = round(canvas * rng.uniform(0.8, 1.0))
        height, width = (shorter, canvas) if shape == 1 else (canvas, shorter)
    style = scenes.SceneStyle(
        objects=options.caption_objects if captioned else options.objects,
        size=(
            options.symbol_size[0],
            max(options.symbol_size[0], min(options.symbol_size[1], _FITS * canvas)),
        ),
        rotation=options.rotation,
        overlap=options.overlap,
        difficulty=options.difficulty,
    )
    chances = symbol_chances(split, options) if chances is None else chances
    # Validation goes round all symbols, so that even a short one judges each.
    first = index % len(chances) if split == "val" else None
    scene, image = scenes.draw_scene(rng, chances, height, width, style, first)
    said: list[captions.Caption] = []
    if captioned:
        said.append(captions.image_caption(rng, scene, options.color_share))
    if split == "grounding":
        for _ in range(1 + int(rng.random() < _SECOND_CAPTION)):
            said.append(captions.grounded_caption(rng, scene, options.color_share))
    said = list({caption.text: caption for caption in said}.values())  # no sentence twice
    return Example(f"{index + 1:09d}.jpg", scene, tuple(said)), image


def _draw_all(
    to: Path, seed: int, options: SymbolsOptions, processes: int
) -> dict[str, list[Example]]:
    tasks = [
        (to, seed, options, split, start, min(start + _CHUNK, options.scenes(split)))
        for split in SPLITS
        for start in range(0, options.scenes(split), _CHUNK)
    ]
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    total = sum(options.scenes(split) for split in SPLITS)
    with tqdm(total=total, desc="symbols", unit=" scenes") as bar:
        for split, chunk in _results(tasks, processes):
            examples[split] += chunk
            bar.update(len(chunk))
    return examples


def _results(tasks: list[tuple], processes: int) -> Iterator[tuple[str, list[Example]]]:
    if processes <= 1 or len(tasks) <= 1:
        yield from map(_draw_chunk, tasks)
        return
    # Not forked: the caller may run threads (JAX, TensorFlow), which a fork would not survive. An
    # executor, since a pool starts anew for ever the workers that fail to start.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context) as pool:
        try:
            yield from pool.map(_draw_chunk, tasks)  # in the order of the tasks
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "symbols: a worker process died or could not start (out of memory, or called "
                "outside an importable file): use one process (--jobs=1, processes=1)."
            ) from error


def _draw_chunk(task: tuple) -> tuple[str, list[Example]]:
    to, seed, options, split, start, stop = task
    chances = symbol_chances(split, options)
    examples = []
    for index in range(start, stop):
        example, image = make_example(seed, split, index, options, chances)
        # Without chroma subsampling: thin colored strokes would lose their color.
        image.save(
            to / "images" / split / example.file_name, quality=options.jpeg_quality, subsampling=0
        )
        examples.append(example)
    return split, examples


def _settings(seed: int, options: SymbolsOptions) -> dict:
    # Through JSON, so that it equals what is read back (tuples become lists).
    return json.loads(json.dumps({"seed": seed, "options": dataclasses.asdict(options)}))


def _check_same(to: Path, seed: int, options: SymbolsOptions) -> None:
    try:
        found = json.loads((to / "annotations" / "symbols.json").read_text(encoding="utf-8"))
        same = found["created_from"] == _settings(seed, options)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{to} exists and does not hold the symbols of this seed and these options: remove it "
            "or choose another directory."
        )


def _write_annotations(
    to: Path, seed: int, options: SymbolsOptions, examples: dict[str, list[Example]]
) -> None:
    categories = lvis_categories(options, [*examples["detection"], *examples["grounding"]])
    base = [category for category in categories if category["group"] == "base"]
    _write_json(to / "detection_train.json", coco_json(examples["detection"], base))
    _write_json(to / "grounding_train.json", mdetr_json(examples["grounding"]))
    with (to / "image_text_train.jsonl").open("w", encoding="utf-8") as lines:
        for example in examples["image_text"]:
            texts = [caption.text for caption in example.captions]
            lines.write(json.dumps({"file_name": example.file_name, "captions": texts}) + "\n")
    _write_json(to / "lvis_val.json", lvis_json(examples["val"], categories, seed, options))
    overview = []
    for symbol, category in zip(scenes.load_symbols(), categories):
        shown = {"codepoint": f"U+{symbol.codepoint:04X}", "character": symbol.character}
        shared = ("id", "name", "group", "frequency", "image_count", "instance_count")
        overview.append(
            {**{key: category[key] for key in shared}, "family": symbol.family, **shown}
        )
    settings = {"created_from": _settings(seed, options), "symbols": overview}
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (to / "symbols.json").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _xywh(box: tuple[float, float, float, float]) -> tuple[list[float], float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)


def _image_entry(index: int, example: Example) -> dict:
    return {
        "id": index + 1,
        "file_name": example.file_name,
        "height": example.scene.height,
        "width": example.scene.width,
    }


def _boxes(examples: list[Example]) -> list[dict]:
    annotations = []
    for i, example in enumerate(examples):
        for thing in example.scene.objects:
            bbox, area = _xywh(thing.box)
            x0, y0, x1, y1 = thing.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": thing.symbol + 1,
                    "bbox": bbox,
                    "area": area,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    return annotations


def coco_json(examples: list[Example], categories: list[dict]) -> dict:
    """COCO instances; keeps the ids of `categories` (LVIS entries), so they have gaps."""
    return {
        "info": {"description": "detclipv2_jax symbols, detection"},
        "licenses": [],
        "images": [_image_entry(i, example) for i, example in enumerate(examples)],
        "annotations": [{**box, "iscrowd": 0} for box in _boxes(examples)],
        "categories": [
            {"id": category["id"], "name": category["name"], "supercategory": category["family"]}
            for category in categories
        ],
    }


def mdetr_json(examples: list[Example]) -> dict:
    """MDETR's layout: an image entry a caption; `tokens_positive`, the characters naming a box."""
    images, annotations = [], []
    for i, example in enumerate(examples):
        for caption in example.captions:
            entry = _image_entry(i, example)
            entry |= {"id": len(images) + 1, "original_id": i + 1, "caption": caption.text}
            images.append({**entry, "dataset_name": "symbols", "tokens_negative": []})
            for mention, (start, end) in zip(caption.mentions, caption.spans):
                for member in mention.members:
                    bbox, area = _xywh(example.scene.objects[member].box)
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": len(images),
                            "category_id": 1,
                            "bbox": bbox,
                            "area": area,
                            "iscrowd": 0,
                            "tokens_positive": [[start, end]],
                        }
                    )
    categories = [{"id": 1, "name": "object", "supercategory": "object"}]
    info = {"description": "detclipv2_jax symbols, grounding"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def lvis_categories(options: SymbolsOptions, boxed: list[Example]) -> list[dict]:
    """LVIS v1 categories of all symbols, ids from 1; counts and frequency of the training boxes.

    Beside LVIS's own fields, each has its "group" (base or novel) and "family".
    """
    _, novel = symbol_groups(options)
    images, instances = collections.Counter(), collections.Counter()
    for example in boxed:
        things = [thing.symbol for thing in example.scene.objects]
        instances.update(things)
        images.update(set(things))
    categories = []
    for i, symbol in enumerate(scenes.load_symbols()):
        frequency = "r" if images[i] <= RARE else "c" if images[i] <= COMMON else "f"
        described = unicodedata.name(symbol.character).lower()
        categories.append(
            {
                "id": i + 1,
                "name": symbol.name,
                "synonyms": [symbol.name],
                "synset": symbol.name.replace(" ", "_") + ".n.01",
                "def": f"pictograph of the {symbol.family} family: {described}",
                "frequency": frequency,
                "image_count": images[i],
                "instance_count": instances[i],
                "group": "novel" if i in novel else "base",
                "family": symbol.family,
            }
        )
    return categories


def lvis_json(
    examples: list[Example], categories: list[dict], seed: int, options: SymbolsOptions
) -> dict:
    """LVIS v1, federated: what an image neither has nor lists as negative is not judged there."""
    images = []
    for i, example in enumerate(examples):
        # A stream apart from the picture's, so that listing more negatives changes no picture.
        rng = scene_generator(seed, "val", i).spawn(1)[0]
        present = sorted({thing.symbol + 1 for thing in example.scene.objects})
        absent = np.setdiff1d([category["id"] for category in categories], present)
        negatives = rng.permutation(absent)[: options.negatives]
        loose = [int(rng.choice(present))] if rng.random() < _NOT_EXHAUSTIVE else []
        entry = _image_entry(i, example)
        entry |= {"neg_category_ids": sorted(map(int, negatives))}
        images.append({**entry, "not_exhaustive_category_ids": loose})
    return {
        "info": {"description": "detclipv2_jax symbols, validation", "version": "v1"},
        "licenses": [],
        "images": images,
        "annotations": _boxes(examples),
        "categories": categories,
    }
