"""Pictures of all kinds from their archive to the pixels that training decodes."""

import io
import json

import cv2
import numpy as np
import pytest
import tensorflow as tf
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from detclipv2_jax.common import pictures
from detclipv2_jax.data import records, transforms
from detclipv2_jax.data.prepare import image_encoding, registry
from detclipv2_jax.data.prepare.examples import ImageFile, ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.report import format_report
from detclipv2_jax.inference import images

BOX = [10, 8, 30, 16]  # x, y, width, height of the red rectangle in the upright picture


def scene(height=64, width=96):
    pixels = np.full((height, width, 3), 150, np.uint8)
    pixels[8:24, 10:40] = (220, 30, 30)
    return pixels


# How a camera stores an upright picture under each orientation: what viewers do, backwards.
STORED = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def encoded(pixels, form="JPEG", **options):
    buffer = io.BytesIO()
    image = (
        Image.fromarray(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
    )
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_photos(
    folder, orientations=STORED, form="JPEG", options=(), scene=scene, as_stored=False
):
    """Write photos under all orientations and COCO annotations of them; return the annotations."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}]}
    for number in orientations:
        stored = scene() if as_stored else STORED[number](scene())
        name = f"{number}{as_stored}.{form.lower()}"
        data = encoded(stored, form, exif=exif(number))
        (folder / "images" / name).write_bytes(data)
        height, width = scene().shape[:2]
        entry = {"id": number, "file_name": name, "height": height, "width": width}
        content["images"].append(entry)
        box = {"image_id": number, "category_id": 1, "bbox": BOX, "area": 480, "iscrowd": 0}
        content["annotations"].append({"id": number, **box})
    return content


def prepared(folder, document, kind="detection", name="annotations.json", **options):
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
    opened = registry.open_archives([folder / name], ImageFolder(folder / "images"), kind)
    options = PrepareOptions(jobs=1, **options)
    return prepare(opened, folder / "out" / kind, name="mini", options=options)


def stored_records(source):
    return [records.decode(data) for data in ArrayRecordDataSource(list(source.shard_paths))]


def as_trained(jpeg):
    """The pixels that training's pipeline decodes, which looks at no EXIF."""
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE").numpy()


def check_red(record):
    pixels = as_trained(record.image).astype(int)
    assert pixels.shape == (record.height, record.width, 3)
    (box,) = record.boxes.round().astype(int)
    inside = pixels[box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2]
    assert np.abs(inside - [220, 30, 30]).max() < 25
    red = (pixels[..., 0] - pixels[..., 2]) > 60
    assert abs(red.sum() - (box[2] - box[0]) * (box[3] - box[1])) < 60
    # Decoders that obey EXIF see the same.
    again = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert again.shape == pixels.shape and np.abs(again - pixels).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_boxes_fit_photos_that_exif_turns(tmp_path, form):
    source = prepared(tmp_path, write_photos(tmp_path, form=form))
    found = stored_records(source)
    assert [record.image_id for record in found] == [str(number) for number in STORED]
    for record in found:
        assert (record.height, record.width) == (64, 96)
        check_red(record)
    assert not source.info["dropped"]
    assert source.info["mended"] == {"images: turned as EXIF says": 7}
    assert "its EXIF orientation is 2, so it is turned" in format_report(source)


def test_square_photos_are_turned(tmp_path):
    square = lambda: scene(96, 96)
    source = prepared(tmp_path, write_photos(tmp_path, scene=square))
    for record in stored_records(source):
        check_red(record)


def test_boxes_of_the_pixels_as_stored_are_known_by_the_size(tmp_path):
    """Annotated 96x64 where the turned photo is 64x96: those pixels stay, and say no more of it."""
    document = write_photos(tmp_path, (5, 6, 7, 8), as_stored=True)
    source = prepared(tmp_path, document)
    for record in stored_records(source):
        check_red(record)
        assert pictures.read(record.image).orientation == 1
    assert source.info["mended"] == {"images: not turned as EXIF says": 4}
    assert source.info["images"]["reencoded"] == 0  # the very pixels, without EXIF
    assert "annotated in the size of the pixels that are not turned" in format_report(source)
    png = write_photos(tmp_path / "png", (6,), "PNG", as_stored=True)
    (record,) = stored_records(prepared(tmp_path / "png", png))
    check_red(record)


def test_photos_of_another_size_are_dropped(tmp_path):
    document = write_photos(tmp_path, (1, 6))
    for entry in document["images"]:
        entry["height"] += 1
    document["images"].append(dict(document["images"][0], id=9, height=64))
    source = prepared(tmp_path, document)
    assert source.info["dropped"]["images: another size"] == 2
    assert "annotated as 96x65, the file has 96x64" in format_report(source)


def test_captioned_and_grounded_photos_are_turned(tmp_path, monkeypatch):
    from detclipv2_jax.text import phrases

    monkeypatch.setattr(phrases, "load", lambda *_: None)
    monkeypatch.setattr(phrases, "noun_phrases", lambda texts, **_: ([] for _ in texts))
    names = [entry["file_name"] for entry in write_photos(tmp_path)["images"]]
    rows = [json.dumps({"image": name, "caption": f"red {name}"}) for name in names]
    for options in ({}, {"store_side": 48}):
        root = tmp_path / f"side{options.get('store_side')}"
        root.mkdir()
        (root / "images").symlink_to(tmp_path / "images")
        source = prepared(root, "\n".join(rows), "image_text", "pairs.jsonl", **options)
        for record in stored_records(source):
            small = as_trained(record.image)
            scale = len(small) / 64
            assert small.shape == (int(64 * scale), int(96 * scale), 3)
            inside = small[int(10 * scale) : int(22 * scale), int(12 * scale) : int(38 * scale)]
            assert np.abs(inside.astype(int) - [220, 30, 30]).max() < 40
    caption = "the red box"
    content = {
        "images": [
            {"id": n, "file_name": name, "height": 64, "width": 96, "caption": caption}
            for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n, "image_id": n, "bbox": BOX, "category_id": 1, "tokens_positive": [[4, 11]]}
            for n in range(len(names))
        ],
        "categories": [],
    }
    found = stored_records(prepared(tmp_path, content, "grounding", "phrases.json"))
    assert len(found) == 8
    for record in found:
        check_red(record)


SMOOTH = np.stack(np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64)), -1)
SMOOTH = np.dstack([SMOOTH, 255 - SMOOTH[..., :1]]).astype(np.uint8)
VEIL = np.dstack([SMOOTH, SMOOTH[..., 1]])
GRAY = SMOOTH[..., 0]
END = encoded(SMOOTH).rindex(b"\xff\xd9")
KINDS = {
    "plain": encoded(SMOOTH),
    "progressive": encoded(SMOOTH, progressive=True),
    "full colors": encoded(SMOOTH, subsampling=0),
    "rgb": encoded(SMOOTH, keep_rgb=True),
    "gray": encoded(GRAY),
    "restart markers": encoded(SMOOTH, restart_marker_blocks=3),
    "trailer of a phone": encoded(SMOOTH) + bytes(500),
    "no end marker": encoded(SMOOTH)[:END] + b"x" * 500,
    "cut, with an end marker": encoded(SMOOTH)[: END - 60] + b"\xff\xd9",
    "mpo": encoded(SMOOTH, "MPO", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)]),
    "cmyk jpeg": encoded(Image.fromarray(SMOOTH).convert("CMYK")),
    "cmyk tiff": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "TIFF"),
    "rgba": encoded(VEIL, "PNG"),
    "rgba webp": encoded(VEIL, "WEBP", lossless=True),
    "gray alpha": encoded(Image.fromarray(VEIL).convert("LA"), "PNG"),
    "palette alpha": encoded(Image.fromarray(VEIL).quantize(64, method=2), "PNG"),
    "transparent index": encoded(Image.fromarray(GRAY).convert("P"), "PNG", transparency=3),
    "transparent color": encoded(SMOOTH, "PNG", transparency=tuple(map(int, SMOOTH[0, 0]))),
    "16 bits": encoded(GRAY.astype(np.uint16) * 257, "PNG"),
    "16 bits tiff": encoded(GRAY.astype(np.uint16) * 257, "TIFF"),
    "float": encoded((GRAY / 255).astype(np.float32), "TIFF"),
    "bits": encoded(Image.fromarray(GRAY).convert("1"), "PNG"),
    "gif": encoded(Image.fromarray(VEIL), "GIF"),
    "orientation 9": encoded(SMOOTH, exif=exif(9)),
    "turned": encoded(SMOOTH, exif=exif(7)),
}


@pytest.mark.parametrize("name", KINDS)
def test_training_decodes_what_detection_reads(tmp_path, name):
    path = tmp_path / "picture.jpg"  # whatever it is
    path.write_bytes(KINDS[name])
    stored = image_encoding.encode_image(ImageFile(path))
    assert stored.problem == ""
    trained, seen = as_trained(stored.jpeg), images.read(path)
    assert trained.shape == seen.shape == (stored.height, stored.width, 3)
    difference = np.abs(trained.astype(int) - seen)
    assert difference.mean() < 1.5, name
    if not stored.reencoded:
        assert difference.max() <= 1 and stored.jpeg == KINDS[name]
    assert pictures.read(stored.jpeg).orientation == 1
    small = images.fit_to_canvas(path, (16, 24))
    shape = small.pixels.shape[:2]
    frame = np.array([2, 0, 0, *(-(-side // 4) for side in trained.shape[:2]), *shape, 0], np.int32)
    placed = transforms.decode_and_place(tf.constant(stored.jpeg), tf.constant(frame)).numpy()
    assert np.abs(placed.astype(int) - small.pixels).mean() < (4 if name == "bits" else 2.5)


def test_wider_than_a_jpeg(tmp_path):
    path = tmp_path / "a.png"
    for size in ((65_501, 2), (2, 70_000)):
        path.write_bytes(encoded(Image.new("RGB", size, "red"), "PNG"))
        stored = image_encoding.encode_image(ImageFile(path))
        assert stored.reason == "images: too wide or high" and "65,500 a side" in stored.problem
        smaller = image_encoding.encode_image(ImageFile(path), store_side=500)
        assert smaller.problem == "" and max(smaller.height, smaller.width) == 500
    path.write_bytes(encoded(Image.new("RGB", (65_500, 1), "red"), "PNG"))
    assert image_encoding.encode_image(ImageFile(path)).problem == ""


def test_one_bad_picture_of_each_kind_is_counted(tmp_path, capfd):
    document = write_photos(tmp_path, (1,))
    bad = {
        "wide": encoded(Image.new("RGB", (70_000, 2)), "PNG"),
        "deep": encoded(GRAY.astype(np.uint16), "PNG"),
        "cut": encoded(SMOOTH)[:-40],
        "lfs": b"version https://git-lfs.github.com/spec/v1",
        "html": b"<html>404</html>",
        "avif": encoded(SMOOTH, "AVIF")[:-99],
    }
    for number, (name, data) in enumerate(bad.items(), 2):
        (tmp_path / "images" / name).write_bytes(data)
        document["images"].append({"id": number, "file_name": name, "height": 64, "width": 96})
    source = prepared(tmp_path, document)
    assert len(source) == 1
    counts = {"images: unreadable": 5, "images: too wide or high": 1}
    assert source.info["dropped"] == counts
    assert "65500" not in capfd.readouterr().err  # libjpeg's own words
