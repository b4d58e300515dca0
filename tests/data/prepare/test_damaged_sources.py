"""Damaged files of every format: one sentence or a count, never a traceback, a hang, a wrong box.

Every case comes from its seed alone; a failure names the seed. The suite runs some, and
`./scripts/test.sh -m slow tests/data/prepare/test_damaged_sources.py` thousands.
"""

import contextlib
import copy
import io
import json
import random
import time
import warnings

import miniature_archives as miniature
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare import image_encoding
from detclipv2_jax.data.prepare.examples import Drops, ImageFile, ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.shards import clip_boxes
from detclipv2_jax.data.prepare.sources import (
    coco,
    conceptual_captions,
    goldg,
    img2dataset,
    lvis,
    objects365,
)
from detclipv2_jax.data.records import decode

SLOWEST = 20.0  # seconds that a case may take; the machine may be busy


def seeds(few: int, many: int):
    """So many cases in the suite, and more of them with -m slow."""
    slow = pytest.param(range(few, many), marks=pytest.mark.slow, id=f"{many - few} more")
    return pytest.mark.parametrize("seeds", [pytest.param(range(few), id=f"{few}"), slow])


@contextlib.contextmanager
def case(seed: int):
    """One case: an error names its seed, and it must not take long."""
    begin = time.monotonic()
    try:
        yield random.Random(seed)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - begin < SLOWEST, f"seed {seed}"


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled, put in, or the end lost, once or several times."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 4, 60, 600))
        kind = rng.choice(("flip", "flip", "cut", "insert", "double", "end", "digits"))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "end":
            del data[max(at, len(data) - 5 * length) :]
        elif kind == "digits":
            data[at : at + 4] = rng.choice(
                (b"9999", b"-1.0", b"1e99", b"NaN,", b"\0\0\0\0", b"}]},")
            )
    return bytes(data)


WRONG = [
    None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**30, float("nan"), float("inf"), "", " ", "7",
    "\ud800", "\0", "x" * 3000, "../../../etc/passwd", "/", ".", "_", [], {}, [[]], [None],
    {"id": 1}, [1, 2], [[0, 3]], [[0, 10**9]], [[3, 0]], [["a", "b"]], [float("nan")] * 4,
    [-5, -5, 1e9, 1e9], [59, 39, 30, 30], [1e30, 1e30, 1e30, 1e30], [10**400, 1, 2, 3],
    ["1", "2", "3", "4"], "<deep>", "<deeper>",
]  # fmt: skip


def twisted(rng: random.Random, document):
    """A document with some values of wrong types, missing, doubled, exchanged."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 3, 10))):
        parent = document
        # The lists of entries at the top mostly stay: behind them it gets interesting.
        for level in range(rng.choice((1, 2, 2, 3, 3, 3, 4))):
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(parent[key], dict | list) and level < 3 and rng.random() < 0.9:
                parent = parent[key]
        if not parent:
            continue
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = rng.choice(keys)
        action = rng.choice(("replace", "replace", "replace", "delete", "double", "exchange"))
        if action == "replace":
            parent[key] = copy.deepcopy(rng.choice(WRONG))
        elif action == "delete":
            del parent[key]
        elif isinstance(parent, list):
            other = rng.choice(keys)
            if action == "double":
                parent.insert(other, parent[key])
            else:
                parent[key], parent[other] = parent[other], parent[key]
    return document


def encoded(document) -> bytes:
    """JSON with whatever Python takes for it, NaN and half surrogate pairs too."""
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    for name, depth in ((b'"<deep>"', 900), (b'"<deeper>"', 200_000)):
        text = text.replace(name, b"[" * depth + b"]" * depth)
    return text


def openers(root):
    """The readers of one JSON file: (its document, how it is opened, its kind of examples)."""
    miniature.write_images(root, 4)
    images = ImageFolder(root / "images")
    names = [f"{number}.jpg" for number in range(4)]
    captions = [{"id": n, "image_id": n % 4, "caption": f"a cat on mat {n}"} for n in range(6)]
    _, lvis_val = miniature.lvis(root / "lvis")
    excluded = goldg.Exclusion([], [miniature.write_json(root / "val.json", VAL)])
    excluded.genome = {4: 9}
    mixed = miniature.mdetr([*names, "4.jpg", "COCO_train2014_000000000009.jpg"])
    for entry in mixed["images"]:
        entry["data_source"] = "vg"
    return {
        "coco": (miniature.coco(names), lambda path: coco.read(path, images)),
        "objects365": (
            miniature.coco(names),
            lambda path: objects365.read(path, images, subset=3),
        ),
        "lvis": (
            json.loads(lvis_val.read_text(encoding="utf-8")),
            lambda path: lvis.read(path, ImageFolder(root / "lvis")),
        ),
        "goldg": (mixed, lambda path: goldg.read(path, images, exclude=excluded)),
        "captions": (
            {"images": miniature.image_entries(names), "annotations": captions},
            lambda path: conceptual_captions.read_coco_captions(path, images),
        ),
    }


def check(archive) -> list:
    """Read all; what every reader promises of its examples."""
    examples, names = list(archive.examples), archive.names
    for example in examples:
        example.image_id.encode()
        assert example.size is None or min(example.size) > 0
        assert archive.kind != "image_text" or example.caption.strip().encode()
        for box in example.boxes:
            assert len(box.xywh) == 4 and all(isinstance(v, float) for v in box.xywh)
            assert box.name.strip().encode() and box.origin
            assert not names or box.name in names
        check_boxes(example)
    for reason, sentences in archive.drops.explained.items():
        assert reason.split(":")[0] in ("images", "boxes", "captions", "shards", "names")
        assert all(sentence.encode() and "\n" not in sentence for sentence in sentences)
    return examples


def check_boxes(example, height: int = 40, width: int = 60) -> None:
    """What preparation makes of an example's boxes is inside the image or counted."""
    drops = Drops()
    boxes, names = clip_boxes(example.boxes, height, width, "here", drops)
    assert len(boxes) == len(names) == len(example.boxes) - drops.dropped.total()
    assert np.isfinite(boxes).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 0.99).all()


def dropped(archive, what: str) -> int:
    return sum(n for reason, n in archive.drops.dropped.items() if reason.startswith(what))


def check_counts(archive, examples, document) -> None:
    """Each entry of the file is an example or was counted."""
    of_images = dropped(archive, "images:")
    if archive.kind == "image_text":
        lost = of_images + dropped(archive, "captions:")
        unusable = sum(archive.drops.dropped[reason] for reason in UNUSABLE)
        assert len(document["annotations"]) == len(examples) + lost - unusable
        return
    assert len(document["images"]) == len(examples) + of_images
    boxes = sum(len(example.boxes) for example in examples)
    counted = boxes + dropped(archive, "boxes:")
    if of_images:
        assert counted <= len(document["annotations"])  # boxes go with their image
    else:
        assert counted == len(document["annotations"])


VAL = {"images": [{"id": 9}]}
UNUSABLE = ("images: malformed entry", "images: entry given twice", "images: one id for two files")


@pytest.mark.parametrize("source", ["coco", "objects365", "lvis", "goldg", "captions"])
@seeds(60, 1500)
def test_json_with_wrong_values(tmp_path, source, seeds):
    document, read = openers(tmp_path)[source]
    whole = 0
    for seed in seeds:
        with case(seed) as rng:
            path = tmp_path / "file.json"
            path.write_bytes(encoded(twisted(rng, document)))
            try:
                archive = read(path)
                examples = check(archive)
            except UserError as error:
                assert "file.json" in str(error) and "\n" not in str(error)
                continue
            check_counts(archive, examples, json.loads(path.read_bytes()))
            whole += 1
    assert whole > len(seeds) / 3


@pytest.mark.parametrize("source", ["coco", "objects365", "lvis", "goldg", "captions"])
@seeds(60, 1500)
def test_json_with_broken_bytes(tmp_path, source, seeds):
    document, read = openers(tmp_path)[source]
    text = encoded(document)
    for seed in seeds:
        with case(seed) as rng:
            path = tmp_path / "file.json"
            path.write_bytes(damaged(rng, text))
            try:
                archive = read(path)
                examples = check(archive)
            except UserError as error:
                assert "file.json" in str(error) and "\n" not in str(error)
                continue
            check_counts(archive, examples, json.loads(path.read_bytes()))


@pytest.mark.parametrize("form", ["lines", "tsv"])
@seeds(100, 2000)
def test_lines(tmp_path, form, seeds):
    miniature.write_images(tmp_path, 4)
    images = ImageFolder(tmp_path / "images")
    rows = [{"image": f"{n % 4}.jpg", "captions": [f"a cat {n}", "mat"]} for n in range(6)]
    for seed in seeds:
        with case(seed) as rng:
            path = tmp_path / "file"
            if form == "tsv":
                text = "\n".join(f"{row['captions'][0]}\t{row['image']}" for row in rows).encode()
                path.write_bytes(damaged(rng, text))
                archive = conceptual_captions.read_tsv(path, images)
            else:
                changed = twisted(rng, rows) if rng.random() < 0.7 else rows
                text = b"\n".join(map(encoded, changed if isinstance(changed, list) else [changed]))
                path.write_bytes(text if changed is not rows else damaged(rng, text))
                archive = conceptual_captions.read_json_lines(path, images)
            examples = check(archive)
            lines = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
            if form == "tsv":
                assert lines == len(examples) + archive.drops.dropped.total()


@seeds(100, 2000)
def test_visual_genomes_list(tmp_path, seeds):
    miniature.goldg(tmp_path)
    path = tmp_path / "image_data.json"
    document = json.loads(path.read_bytes())
    for seed in seeds:
        with case(seed) as rng:
            data = encoded(twisted(rng, document))
            path.write_bytes(damaged(rng, data) if rng.random() < 0.5 else data)
            try:
                genome = goldg.Exclusion([tmp_path]).genome
            except UserError as error:
                assert "image_data.json" in str(error)
            else:
                assert all(isinstance(n, int) for pair in genome.items() for n in pair)


@seeds(60, 1500)
def test_minival(tmp_path, seeds):
    _, val = miniature.lvis(tmp_path)
    document, to = json.loads(val.read_bytes()), tmp_path / "to.json"
    for seed in seeds:
        with case(seed) as rng:
            val.write_bytes(encoded(twisted(rng, document)))
            to.unlink(missing_ok=True)
            try:
                count = lvis.write_minival(val, to)
            except UserError as error:
                assert "lvis_v1_val.json" in str(error) and not to.exists()
            else:
                assert len(json.loads(to.read_bytes())["images"]) == count


def shard_counts(archive, examples, entries: int) -> None:
    assert entries == len(examples) + dropped(archive, "images:") + dropped(archive, "captions:")


@pytest.mark.parametrize("parquet", [False, True])
@seeds(100, 2500)
def test_tars(tmp_path, parquet, seeds):
    whole = miniature.webdataset(tmp_path, miniature.shard_entries(6), parquet=parquet)
    data = whole.read_bytes()
    # Most of a small tar is zeros: damage falls on its headers and contents.
    with miniature.tarfile.open(whole) as tar:
        spots = [member.offset + at for member in tar for at in (0, 100, 124, 148, 156, 257, 345)]
    for seed in seeds:
        with case(seed) as rng:
            changed = bytearray(data if rng.random() < 0.5 else damaged(rng, data))
            for _ in range(rng.choice((0, 1, 1, 3))):
                spot = rng.choice(spots) + rng.randrange(12)
                changed[spot : spot + 1] = rng.choice(
                    (b"\0", b"7", b"\xff", b"\x80", b"x", b"g", b"L", b"S", rng.randbytes(1))
                )
            if rng.random() < 0.7:
                fix_checksums(changed, spots[::7])
            whole.write_bytes(changed)
            archive = img2dataset.read(tmp_path)
            examples = check(archive)
            for example in examples:
                assert example.image.offset + example.image.size <= len(changed)
                assert len(example.image.read()) == example.image.size
            found = img2dataset._read_shard(whole.with_suffix(""), Drops())
            twice = archive.drops.dropped["images: key given twice"]
            shard_counts(archive, examples, sum(map(len, found)) + twice)


def fix_checksums(data: bytearray, headers: list[int]) -> None:
    """Fix the checksums of changed headers: damage that a checksum does not show."""
    for at in headers:
        if at + 512 <= len(data):
            data[at + 148 : at + 156] = b"        "
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


@seeds(60, 1500)
def test_folders_of_shards(tmp_path, seeds):
    entries = miniature.shard_entries(5)
    for seed in seeds:
        with case(seed) as rng:
            root = tmp_path / str(seed)
            folder = miniature.shard_folder(root, entries)
            for path in rng.sample(sorted(folder.iterdir()), rng.choice((1, 2, 5))):
                if rng.random() < 0.3:
                    path.unlink()
                elif path.suffix == ".json":
                    path.write_bytes(encoded(twisted(rng, json.loads(path.read_bytes()))))
                else:
                    path.write_bytes(damaged(rng, path.read_bytes()))
            if rng.random() < 0.6:
                (root / "00000.parquet").unlink()
            archive = img2dataset.read(root)
            examples = check(archive)
            (found,) = img2dataset._read_shard(folder, Drops())
            shard_counts(archive, examples, len(found))


@pytest.mark.parametrize("form", ["with a tar", "with images"])
@seeds(60, 2000)
def test_parquet(tmp_path, form, seeds):
    entries = miniature.shard_entries(8)
    if form == "with a tar":
        whole = miniature.webdataset(tmp_path / "whole", entries).with_suffix(".parquet")
        tar = whole.with_suffix(".tar").read_bytes()
    else:
        whole = miniature.write_parquet(tmp_path / "whole.parquet", entries, images=True)
    data = whole.read_bytes()
    for seed in seeds:
        with case(seed) as rng:
            root = tmp_path / str(seed)
            path = miniature.write_file(root / "00000.parquet", damaged(rng, data))
            if form == "with a tar":
                path.with_suffix(".tar").write_bytes(tar)
            archive = img2dataset.read(root)
            for example in check(archive):
                opened = image_encoding.encode_image(example.image)
                assert opened.problem or opened.jpeg[:2] == b"\xff\xd8"


@seeds(200, 6000)
def test_jpegs(tmp_path, seeds):
    """Whatever the damage, an image is opened or its problem is reported."""
    kinds = [
        miniature.jpeg(),
        miniature.jpeg(progressive=True),
        miniature.jpeg(100, 80, quality=30),
        image_bytes("JPEG", "L"),
        image_bytes("JPEG", "CMYK"),
        image_bytes("PNG", "RGB"),
        image_bytes("PNG", "P"),
        image_bytes("WEBP", "RGB"),
        image_bytes("GIF", "P"),
        image_bytes("TIFF", "RGB"),
    ]
    readable = 0
    for seed in seeds:
        with case(seed) as rng, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's about sizes and EXIF
            path = tmp_path / "image"
            path.write_bytes(damaged(rng, rng.choice(kinds[:3] * 3 + kinds)))
            opened = image_encoding.encode_image(ImageFile(path))
            if opened.problem:
                assert opened.problem.encode() and not opened.jpeg
                continue
            readable += 1
            with Image.open(io.BytesIO(opened.jpeg)) as image:
                image.load()
                assert image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
                assert image.size == (opened.width, opened.height)
    assert len(seeds) / 20 < readable < len(seeds)


def image_bytes(format_name: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    miniature.picture(mode=mode).save(buffer, format_name)
    return buffer.getvalue()


@seeds(20, 1000)
def test_prepared(tmp_path, seeds):
    """Damaged annotations and images, prepared as records: every entry is kept or counted."""
    for seed in seeds:
        with case(seed) as rng:
            root = tmp_path / str(seed)
            document, read = openers(root)[rng.choice(("coco", "goldg", "captions"))]
            path = root / "file.json"
            path.write_bytes(encoded(twisted(rng, document)))
            for image in (root / "images").iterdir():
                if rng.random() < 0.3:
                    image.write_bytes(damaged(rng, image.read_bytes()))
            try:
                archive = read(path)
                kept = prepare([archive], root / "to", name="x", options=PrepareOptions(jobs=1))
            except UserError as error:
                assert "\n" not in str(error)
                continue
            check_records(kept, json.loads(path.read_bytes()))


def check_records(source, document) -> None:
    drops = source.info["dropped"]
    lost = sum(n for r, n in drops.items() if r.startswith(("images:", "captions:")))
    if source.kind == "image_text":
        lost -= sum(drops.get(r, 0) for r in UNUSABLE)
        assert len(document["annotations"]) == len(source) + lost
    else:
        assert len(document["images"]) == len(source) + lost
    for shard in source.shard_paths:
        for data in ArrayRecordReader(shard).read_all():
            record = decode(data)
            assert (record.boxes >= 0).all()
            assert (record.boxes[:, 2:] <= [record.width, record.height]).all()
