"""Generate the built-in data: an open-vocabulary world of pictographs, drawn from a seed.

It takes about a minute. The data have the formats of real data, so the same readers read them: COCO
instances JSON for detection, MDETR's JSON for grounding, JSON lines of captions, and an LVIS v1
JSON for validation. Some of the symbols are *novel*: they occur in captions and in validation, but
never have a training box.

    DIR/images/{detection,grounding,image_text,val}/000000001.jpg
    DIR/annotations/detection_train.json     COCO; its categories are the base symbols
    DIR/annotations/grounding_train.json     MDETR; one image entry per caption
    DIR/annotations/image_text_train.jsonl   {"file_name": ..., "captions": [...]}
    DIR/annotations/lvis_val.json            LVIS v1; base and novel, all boxed
    DIR/annotations/symbols.json             overview of the symbols, the options and the seed

Every `file_name` is relative to the image folder of its kind.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from detclipv2_jax.common.atomic import replacing_directory
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import symbols_captions as captions
from detclipv2_jax.data.prepare.sources import symbols_scenes as scenes

SPLITS = ("detection", "grounding", "image_text", "val")
# LVIS: upper limits of the training images of a rare and of a common category.
RARE, COMMON = 10, 100

_SECOND_CAPTION = 0.3  # share of the grounding images that have two captions
_NOT_EXHAUSTIVE = 0.1  # share of the validation images that list a category as not exhaustive
_FITS = 0.7  # a long side of this share of the canvas fits at any rotation
_CHUNK = 50  # scenes per task of the process pool


@dataclasses.dataclass(frozen=True)
class SymbolsOptions:
    """Size and difficulty of the built-in data. Lengths are in pixels, shares are fractions."""

    detection_scenes: int = 7600
    grounding_scenes: int = 1200
    image_text_scenes: int = 9600
    val_scenes: int = 500
    canvas: int = 128  # longer side of a scene with boxes; the shorter one is 0.8 to 1.0 of it
    caption_canvas: int = 64  # side of a captioned scene
    objects: tuple[int, int] = (2, 5)  # fewest and most in a scene with boxes
    caption_objects: tuple[int, int] = (1, 1)  # in a captioned scene
    # Long side before rotation; at most 0.7 of the canvas, so that it fits at any rotation.
    symbol_size: tuple[float, float] = (40.0, 60.0)
    rotation: float = 15.0  # degrees, in both directions
    overlap: float = 0.1  # largest share of the smaller of two boxes that may be covered
    difficulty: float = 0.1  # contrast of the background pattern, 0 to 1
    color_share: float = 0.4  # share of the phrases that name the color
    novel: int = 45  # symbols that never have a training box
    novel_share: float = 0.35  # share of the objects in captioned scenes that are novel
    split_seed: int = (
        2  # of base and novel symbols; not `seed`, so that the split is always the same
    )
    negatives: int = 20  # categories that a validation image lists as absent
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
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field, valid in checks.items():
            if not valid:
                raise UserError(
                    f"SymbolsOptions.{field} = {getattr(self, field)} is invalid for {total} "
                    f"symbols and canvases of {self.canvas} and {self.caption_canvas} pixels. The "
                    f"default is {defaults[field]}."
                )

    def scenes(self, split: str) -> int:
        """Return the number of scenes of one of `SPLITS`."""
        return int(getattr(self, f"{split}_scenes"))


@dataclasses.dataclass(frozen=True)
class DrawnScene:
    """A scene with its file name and captions."""

    file_name: str
    scene: scenes.Scene
    captions: tuple[captions.Caption, ...]  # empty in detection and val


def generate(
    to: str | os.PathLike,
    *,
    seed: int = 0,
    processes: int = 2,
    options: SymbolsOptions | None = None,
) -> None:
    """Draw all images and write all annotations to the new directory `to`.

    The result depends only on `seed` and `options`, not on `processes`. `to` appears when it is
    complete. If `to` already holds the same data, nothing is done.

    Raises:
        UserError: `to` exists and holds anything else.
    """
    options = options or SymbolsOptions()
    to = Path(to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        _check_same(to, seed, options)
        return
    with replacing_directory(to) as partial:
        for split in SPLITS:
            (partial / "images" / split).mkdir(parents=True)
        (partial / "annotations").mkdir()
        drawn = _draw_all(partial, seed, options, processes)
        _write_annotations(partial / "annotations", seed, options, drawn)


def symbol_groups(options: SymbolsOptions) -> tuple[list[int], list[int]]:
    """Return the positions in `load_symbols()` of the base and the novel symbols, ascending."""
    symbols = scenes.load_symbols()
    novel = scenes.novel_symbols(symbols, options.novel, options.split_seed)
    return [i for i in range(len(symbols)) if i not in novel], sorted(novel)


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random generator of one scene: a separate stream per (seed, split, index)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    return np.random.Generator(np.random.PCG64(sequence))


def symbol_chances(split: str, options: SymbolsOptions) -> Float[np.ndarray, " s"]:
    """Return the probability of each symbol in the scenes of a split.

    Training scenes with boxes have base symbols with a long tail: of 190 symbols, 8 are in a few
    images (rare), 25 in some tens (common), and the rest are equally likely. In captioned scenes
    the novel symbols share `novel_share` evenly, and the base symbols share the rest. In validation
    all symbols are equally likely.
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
    """Return the expected number of boxes of each symbol, `mean` on average, in random order."""
    rare, common = round(0.042 * count), round(0.13 * count)
    boxes = np.full(count, mean)
    # Well inside LVIS's limits of 10 and 100 images, so that few symbols cross them by chance.
    boxes[:rare] = np.minimum(mean, np.geomspace(2, 6, rare))
    boxes[rare : rare + common] = np.minimum(mean, np.geomspace(14, 70, common))
    boxes[rare + common :] *= 1 + (mean * count - boxes.sum()) / boxes[rare + common :].sum()
    return np.random.Generator(np.random.PCG64([seed, count])).permutation(boxes)


def make_scene(
    seed: int, split: str, index: int, options: SymbolsOptions, chances: np.ndarray | None = None
) -> tuple[DrawnScene, Image.Image]:
    """Return scene number `index` of a split and its RGB image, a pure function of the arguments.

    `chances` is `symbol_chances(split, options)`, for callers that draw many scenes.
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
    # Validation cycles through all symbols, so that even a small one covers each.
    first = index % len(chances) if split == "val" else None
    scene, image = scenes.draw_scene(rng, chances, height, width, style, first)
    written: list[captions.Caption] = []
    if captioned:
        written.append(captions.image_caption(rng, scene, options.color_share))
    if split == "grounding":
        for _ in range(1 + int(rng.random() < _SECOND_CAPTION)):
            written.append(captions.grounded_caption(rng, scene, options.color_share))
    written = list({caption.text: caption for caption in written}.values())  # no duplicates
    return DrawnScene(f"{index + 1:09d}.jpg", scene, tuple(written)), image


def _draw_all(
    to: Path, seed: int, options: SymbolsOptions, processes: int
) -> dict[str, list[DrawnScene]]:
    tasks = [
        (to, seed, options, split, start, min(start + _CHUNK, options.scenes(split)))
        for split in SPLITS
        for start in range(0, options.scenes(split), _CHUNK)
    ]
    drawn: dict[str, list[DrawnScene]] = {split: [] for split in SPLITS}
    total = sum(options.scenes(split) for split in SPLITS)
    with tqdm(total=total, desc="symbols", unit=" scenes") as bar:
        for split, chunk in _run_tasks(tasks, processes):
            drawn[split] += chunk
            bar.update(len(chunk))
    return drawn


def _run_tasks(tasks: list[tuple], processes: int) -> Iterator[tuple[str, list[DrawnScene]]]:
    if processes <= 1 or len(tasks) <= 1:
        yield from map(_draw_chunk, tasks)
        return
    # Spawned, not forked: threads of the caller (JAX, TensorFlow) do not survive a fork. An
    # executor, because a multiprocessing.Pool restarts workers that fail to start forever.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context) as pool:
        try:
            yield from pool.map(_draw_chunk, tasks)  # in the order of the tasks
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "symbols: a worker process died or could not start (out of memory, or the caller "
                "is not an importable file). Use one process: --jobs=1 or processes=1."
            ) from error


def _draw_chunk(task: tuple) -> tuple[str, list[DrawnScene]]:
    to, seed, options, split, start, stop = task
    chances = symbol_chances(split, options)
    chunk = []
    for index in range(start, stop):
        drawn, image = make_scene(seed, split, index, options, chances)
        # No chroma subsampling: thin colored strokes would lose their color.
        image.save(
            to / "images" / split / drawn.file_name, quality=options.jpeg_quality, subsampling=0
        )
        chunk.append(drawn)
    return split, chunk


def _provenance(seed: int, options: SymbolsOptions) -> dict:
    # Through JSON, so that it equals what is read from disk (tuples become lists).
    return json.loads(json.dumps({"seed": seed, "options": dataclasses.asdict(options)}))


def _check_same(to: Path, seed: int, options: SymbolsOptions) -> None:
    try:
        found = json.loads((to / "annotations" / "symbols.json").read_text(encoding="utf-8"))
        same = found["created_from"] == _provenance(seed, options)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{to}: exists and does not hold the symbols of this seed and these options. Remove it "
            "or choose another directory."
        )


def _write_annotations(
    to: Path, seed: int, options: SymbolsOptions, drawn: dict[str, list[DrawnScene]]
) -> None:
    categories = lvis_categories(options, [*drawn["detection"], *drawn["grounding"]])
    base = [category for category in categories if category["group"] == "base"]
    _write_json(to / "detection_train.json", coco_json(drawn["detection"], base))
    _write_json(to / "grounding_train.json", mdetr_json(drawn["grounding"]))
    with (to / "image_text_train.jsonl").open("w", encoding="utf-8") as lines:
        for one in drawn["image_text"]:
            texts = [caption.text for caption in one.captions]
            lines.write(json.dumps({"file_name": one.file_name, "captions": texts}) + "\n")
    _write_json(to / "lvis_val.json", lvis_json(drawn["val"], categories, seed, options))
    overview = []
    for symbol, category in zip(scenes.load_symbols(), categories):
        shown = {"codepoint": f"U+{symbol.codepoint:04X}", "character": symbol.character}
        shared = ("id", "name", "group", "frequency", "image_count", "instance_count")
        overview.append(
            {**{key: category[key] for key in shared}, "family": symbol.family, **shown}
        )
    content = {"created_from": _provenance(seed, options), "symbols": overview}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (to / "symbols.json").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _xywh(box: tuple[float, float, float, float]) -> tuple[list[float], float]:
    """Return a COCO bbox and its area."""
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)


def _image_entry(index: int, drawn: DrawnScene) -> dict:
    return {
        "id": index + 1,
        "file_name": drawn.file_name,
        "height": drawn.scene.height,
        "width": drawn.scene.width,
    }


def _annotations(drawn: list[DrawnScene]) -> list[dict]:
    annotations = []
    for i, one in enumerate(drawn):
        for placed in one.scene.objects:
            bbox, area = _xywh(placed.box)
            x0, y0, x1, y1 = placed.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": placed.symbol + 1,
                    "bbox": bbox,
                    "area": area,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    return annotations


def coco_json(drawn: list[DrawnScene], categories: list[dict]) -> dict:
    """Return COCO instances. Category ids are those of `categories` (LVIS entries), with gaps."""
    return {
        "info": {"description": "detclipv2_jax symbols, detection"},
        "licenses": [],
        "images": [_image_entry(i, one) for i, one in enumerate(drawn)],
        "annotations": [{**entry, "iscrowd": 0} for entry in _annotations(drawn)],
        "categories": [
            {"id": category["id"], "name": category["name"], "supercategory": category["family"]}
            for category in categories
        ],
    }


def mdetr_json(drawn: list[DrawnScene]) -> dict:
    """Return MDETR's JSON: one image entry per caption; `tokens_positive` are character spans."""
    images, annotations = [], []
    for i, one in enumerate(drawn):
        for caption in one.captions:
            entry = _image_entry(i, one)
            entry |= {"id": len(images) + 1, "original_id": i + 1, "caption": caption.text}
            images.append({**entry, "dataset_name": "symbols", "tokens_negative": []})
            for mention, (start, end) in zip(caption.mentions, caption.spans):
                for member in mention.members:
                    bbox, area = _xywh(one.scene.objects[member].box)
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


def lvis_categories(options: SymbolsOptions, boxed: list[DrawnScene]) -> list[dict]:
    """Return the LVIS v1 categories of all symbols, with ids from 1.

    Counts and frequency are those of the training boxes in `boxed`. In addition to LVIS's fields,
    each category has its "group" (base or novel) and "family".
    """
    _, novel = symbol_groups(options)
    images, instances = collections.Counter(), collections.Counter()
    for drawn in boxed:
        present = [placed.symbol for placed in drawn.scene.objects]
        instances.update(present)
        images.update(set(present))
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
    drawn: list[DrawnScene], categories: list[dict], seed: int, options: SymbolsOptions
) -> dict:
    """Return LVIS v1's JSON.

    It is federated: an image is evaluated only on the categories that it has or lists as absent.
    """
    images = []
    for i, one in enumerate(drawn):
        # Not the stream of the scene: the number of negatives must not change the image.
        rng = scene_generator(seed, "val", i).spawn(1)[0]
        present = sorted({placed.symbol + 1 for placed in one.scene.objects})
        absent = np.setdiff1d([category["id"] for category in categories], present)
        negatives = rng.permutation(absent)[: options.negatives]
        loose = [int(rng.choice(present))] if rng.random() < _NOT_EXHAUSTIVE else []
        entry = _image_entry(i, one)
        entry |= {"neg_category_ids": sorted(map(int, negatives))}
        images.append({**entry, "not_exhaustive_category_ids": loose})
    return {
        "info": {"description": "detclipv2_jax symbols, validation", "version": "v1"},
        "licenses": [],
        "images": images,
        "annotations": _annotations(drawn),
        "categories": categories,
    }
