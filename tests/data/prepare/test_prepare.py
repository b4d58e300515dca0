"""From an archive to a source: what is kept, changed or dropped, and what is reported."""

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from miniature_archives import coco, jpeg, mdetr, picture, write_images, write_json
from PIL import Image

from detclipv2_jax import prepare as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import image_encoding, registry
from detclipv2_jax.data.prepare.examples import Box, Drops, ImageFile, ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.report import format_report
from detclipv2_jax.data.prepare.shards import clip_boxes
from detclipv2_jax.data.records import decode
from detclipv2_jax.text import phrases

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
ONE = PrepareOptions(jobs=1)


@pytest.fixture
def folder(tmp_path):
    """An archive of all three kinds: four images."""
    names = write_images(tmp_path, 4)
    write_json(tmp_path / "annotations" / "instances_train.json", coco(names))
    write_json(tmp_path / "annotations" / "phrases_train.json", mdetr(names))
    rows = [{"image": name, "captions": ["A red cat near two dogs.", name]} for name in names]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture(scope="session")
def spacy_model():
    try:
        phrases.load()
    except UserError as error:
        pytest.skip(f"no English spaCy pipeline: {error}")


def prepared(folder, document, kind="detection", options=ONE, name="annotations.json") -> Source:
    path = write_json(folder / name, document)
    opened = registry.open_archives([path], ImageFolder(folder / "images"), kind)
    return prepare(opened, folder / "out" / kind, name="mini", options=options)


def records(source):
    return [decode(data) for data in ArrayRecordDataSource(list(source.shard_paths))]


def test_detection(folder):
    source = prepared(folder, coco(["0.jpg", "1.jpg", "2.jpg"]))
    assert (len(source), source.kind, source.name) == (3, "detection", "mini")
    # All categories are there, in the file's order; bus has no box and may still be a negative.
    rows = [(row["name"], row["count"], row["vocabulary"]) for row in source.concepts]
    assert rows == [("cat", 2, True), ("traffic light", 2, True), ("bus", 0, True)]
    first, _, last = records(source)
    assert first.image == (folder / "images" / "0.jpg").read_bytes()  # the file, byte for byte
    np.testing.assert_allclose(
        first.boxes, [[5, 4, 25, 14.5], [35 / 3, 4, 95 / 3, 14.5]], rtol=1e-6
    )
    assert first.labels.tolist() == [0, 1] and first.concepts == ("cat", "traffic light")
    assert first.image_id == "0"
    assert last.boxes.shape == (0, 4) and source.positives_of(2).size == 0
    assert source.info["dropped"] == {"boxes: crowd": 1} and source.info["mended"] == {}
    table = format_report(source)
    assert "dropped boxes: crowd" in table and "annotation 99" in table


def test_grounding(folder):
    document = mdetr(["0.jpg", "1.jpg"])
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 3]
    source = prepared(folder, document, "grounding")
    names = [row["name"] for row in source.concepts]
    assert names == ["red cat", "dogs", "red dogs", "cat"]
    three = ("red cat", "dogs", "red dogs")
    assert [record.concepts for record in records(source)] == [three, ("cat",), three]
    assert [record.labels.tolist() for record in records(source)] == [[0, 1, 2], [0], [0, 1, 2]]
    assert [source.positives_of(i).tolist() for i in range(3)] == [[0, 1, 2], [3], [0, 1, 2]]
    assert source.info["dropped"] == {"captions: no box": 1}
    assert source.vocabulary.all()


def test_image_text(folder, spacy_model):
    opened = registry.open_archives(
        [folder / "pairs.jsonl"], ImageFolder(folder / "images"), "image_text"
    )
    source = prepare(opened, folder / "out", name="pairs", options=ONE)
    names = [row["name"] for row in source.concepts]
    first, second, third = records(source)[:3]
    assert first.concepts == ("a red cat near two dogs.", "red cat", "dogs")
    assert second.concepts[0] == "0.jpg"
    assert third.concepts == first.concepts and third.image_id == "1.jpg#0"
    assert tuple(names[i] for i in source.positives_of(0)) == first.concepts
    by_name = {row["name"]: row for row in source.concepts}
    assert by_name["a red cat near two dogs."] == {
        "name": "a red cat near two dogs.",
        "definition": None,
        "synset": None,
        "count": 4,
        "vocabulary": False,
    }
    assert by_name["red cat"]["vocabulary"] and by_name["red cat"]["count"] == 4


def test_phrase_limit(folder, spacy_model):
    opened = registry.open_archives(
        [folder / "pairs.jsonl"], ImageFolder(folder / "images"), "image_text"
    )
    source = prepare(
        opened, folder / "out", name="p", options=PrepareOptions(jobs=1, phrase_limit=1)
    )
    assert max(len(record.concepts) for record in records(source)) == 2


def test_boxes_are_clipped_dropped_and_counted():
    def box(*xywh):
        return Box(xywh, f"name {xywh[0]}", f"annotation {xywh[0]}")

    drops = Drops()
    boxes, names = clip_boxes(
        [
            box(1, 2, 3, 4),
            box(33.3, 7.1, 1, 1),  # just a pixel
            box(-5, 30, 20, 30),  # reaches out at two sides
            box(50, 0, 10.3, 40),  # over the edge by rounding alone
            box(2, 2, 0, 5),
            box(3, 3, 5, -2),
            box(4, 4, 0.5, 9),
            box(70, 3, 5, 5),
            box(-9, -9, 9.5, 20),
            box(float("nan"), 1, 2, 3),
            box(6, 1, float("inf"), 3),
            box(0, 0, 60, 40),
            box(1e30, 1, 1e30, 3),
        ],
        40,
        60,
        "x.jpg",
        drops,
    )
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(
        boxes,
        np.array(
            [
                [1, 2, 4, 6],
                [33.3, 7.1, 34.3, 8.1],
                [0, 30, 15, 40],
                [50, 0, 60, 40],
                [0, 0, 60, 40],
            ],
            np.float32,
        ),
    )
    assert names == ["name 1", "name 33.3", "name -5", "name 50", "name 0"]
    assert drops.changed == {"boxes: clipped": 1}
    assert drops.dropped == {
        "boxes: no area": 3,
        "boxes: outside the image": 3,
        "boxes: not finite": 2,
    }
    assert "annotation 70" in drops.explained["boxes: outside the image"][0]
    assert "60x40 pixels" in drops.explained["boxes: clipped"][0]
    none, no_names = clip_boxes([], 40, 60, "x.jpg", drops)
    assert none.shape == (0, 4) and no_names == []


def encoded(format_name: str, mode: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture(mode=mode).save(buffer, format_name, **options)
    return buffer.getvalue()


def test_images_of_all_kinds(tmp_path):
    path = tmp_path / "image"
    for data, kept in (
        (jpeg(), True),
        (jpeg(progressive=True), True),
        (encoded("JPEG", "L"), True),
        (encoded("JPEG", "CMYK"), False),
        (encoded("PNG", "RGB"), False),
        (encoded("PNG", "RGBA"), False),
        (encoded("PNG", "P"), False),
        (encoded("PNG", "1"), False),
        (encoded("WEBP", "RGB"), False),
        (encoded("BMP", "RGB"), False),
    ):
        path.write_bytes(data)
        opened = image_encoding.encode_image(ImageFile(path))
        assert opened.problem == "" and (opened.height, opened.width) == (40, 60)
        assert opened.reencoded != kept and (opened.jpeg == data) == kept
        stored = Image.open(io.BytesIO(opened.jpeg))
        stored.load()
        assert stored.format == "JPEG" and stored.size == (60, 40) and stored.mode in ("RGB", "L")


def test_pixels_survive_the_new_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(40) * 4, np.arange(60) * 1.5).astype(np.uint8)
    Image.fromarray(np.stack([smooth, smooth[::-1], 255 - smooth], -1)).save(tmp_path / "a.png")
    deep = smooth.astype(np.uint16) * 257  # 16 bits a pixel
    Image.fromarray(deep).save(tmp_path / "b.png")
    for name, channel in (("a.png", smooth), ("b.png", smooth)):
        stored = Image.open(
            io.BytesIO(image_encoding.encode_image(ImageFile(tmp_path / name)).jpeg)
        ).convert("RGB")
        difference = np.asarray(stored)[..., 0].astype(int) - channel
        assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(
    ("size", "stored"),
    [((90, 60), (40, 27)), ((60, 90), (27, 40)), ((400, 400), (40, 40)), ((40, 40), None),
     ((30, 20), None), ((2000, 3), (40, 1))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_stored_smaller(tmp_path, size, stored, kind):
    ramp = np.add.outer(np.linspace(0, 120, size[0]), np.linspace(0, 120, size[1]))
    Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8)).save(tmp_path / "a", kind)
    opened = image_encoding.encode_image(ImageFile(tmp_path / "a"), store_side=40)
    assert opened.problem == "" and opened.original_size == size
    assert opened.shrunk == (stored is not None) and opened.reencoded == (kind == "PNG")
    assert (opened.height, opened.width) == (stored or size)
    again = Image.open(io.BytesIO(opened.jpeg)).convert("L")
    assert again.size == (opened.width, opened.height)
    expected = np.add.outer(np.linspace(0, 120, opened.height), np.linspace(0, 120, opened.width))
    if stored and min(stored) > 1:
        assert np.abs(np.asarray(again) - expected).mean() < 3
    if not stored and kind == "JPEG":
        assert opened.jpeg == (tmp_path / "a").read_bytes()


def test_shrinking_antialiases(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (400, 200))  # one pixel wide
    Image.fromarray(stripes).save(tmp_path / "a.png")
    opened = image_encoding.encode_image(ImageFile(tmp_path / "a.png"), store_side=90)
    assert np.abs(np.asarray(Image.open(io.BytesIO(opened.jpeg)).convert("L")) - 127.5).max() < 25


def test_only_captioned_images_are_stored_smaller(folder, spacy_model):
    options = PrepareOptions(jobs=1, store_side=32)
    images = ImageFolder(folder / "images")
    pairs = registry.open_archives([folder / "pairs.jsonl"], images, "image_text")
    source = prepare(pairs, folder / "pairs", name="p", options=options)
    assert set(source.width.tolist()) == {32} and set(source.height.tolist()) == {21}
    assert source.info["images"]["shrunk"] == 8 and "images stored smaller" in format_report(source)
    one = options, dataclasses.replace(options, store_side=None)
    a, b = (registry.fingerprint([folder / "pairs.jsonl"], images, o) for o in one)
    assert a != b


def test_an_image_in_a_file_of_many(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"before" + jpeg(seed=3) + b"after")
    inside = ImageFile(tmp_path / "a.tar", 6, len(jpeg(seed=3)))
    assert image_encoding.encode_image(inside).jpeg == jpeg(seed=3) and "byte 6" in str(inside)
    beyond = ImageFile(tmp_path / "a.tar", 10**6, 100)
    assert image_encoding.encode_image(beyond).problem == "it is empty"


def test_unreadable_images(tmp_path):
    cases = {
        "empty": b"",
        "html": b"<html>404</html>",
        "cut": jpeg(400, 600)[:5000],
        "cut png": encoded("PNG", "RGB")[:200],
        "header alone": jpeg()[:4],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        problem = image_encoding.encode_image(ImageFile(tmp_path / name)).problem
        assert problem and "0x" not in problem, name
    assert image_encoding.encode_image(ImageFile(tmp_path / "none")).problem
    assert image_encoding.encode_image(ImageFile(tmp_path)).problem


def test_broken_images_are_dropped_and_counted(folder):
    (folder / "images" / "1.jpg").write_bytes(jpeg(seed=1)[:300])
    os.remove(folder / "images" / "2.jpg")
    (folder / "images" / "3.jpg").write_bytes(jpeg(60, 40))  # rotated: the boxes do not fit it
    document = coco(["0.jpg", "1.jpg", "2.jpg", "3.jpg"])
    source = prepared(folder, document)
    assert [record.image_id for record in records(source)] == ["0"]
    assert source.info["dropped"] == {
        "boxes: crowd": 1,
        "images: another size": 1,
        "images: missing": 1,
        "images: unreadable": 1,
    }
    explained = source.info["explained"]
    assert "annotated as 60x40, the file has 40x60" in explained["images: another size"][0]
    assert "1.jpg (image 1)" in explained["images: unreadable"][0]


def test_a_png_is_stored_as_jpeg_and_counted(folder):
    picture().save(folder / "images" / "0.png")
    source = prepared(folder, coco(["0.png", "1.jpg"]))
    assert source.info["images"]["reencoded"] == 1
    assert records(source)[0].image.startswith(b"\xff\xd8")


def test_nothing_usable_is_an_error(folder):
    document = coco(["8.jpg", "9.jpg"])
    with pytest.raises(UserError, match="nothing usable.*8.jpg.*--images=DIR"):
        prepared(folder, document)
    document = coco(["0.jpg", "1.jpg"])
    for annotation in document["annotations"]:
        del annotation["bbox"]
        annotation["iscrowd"] = 0
    with pytest.raises(UserError, match="none of its boxes is usable.*bbox"):
        prepared(folder, document)
    with pytest.raises(UserError, match="nothing usable"):
        prepared(folder, {"images": [], "annotations": [], "categories": []})
    assert not (folder / "out" / "detection").exists()
    assert not list((folder / "out").iterdir())  # no half-written rest either


def test_archives_are_joined(folder):
    paths = [
        write_json(folder / "a.json", coco(["0.jpg", "1.jpg"])),
        write_json(folder / "b.json", coco(["2.jpg", "3.jpg"])),
    ]
    opened = registry.open_archives(paths, ImageFolder(folder / "images"), "detection")
    source = prepare(opened, folder / "out", name="both", options=ONE)
    assert len(source) == 4 and [row["count"] for row in source.concepts] == [2, 2, 0]
    assert source.info["dropped"] == {"boxes: crowd": 2}


def test_discover(folder):
    write_json(folder / "annotations" / "instances_val.json", coco(["0.jpg", "1.jpg"]))
    write_json(folder / "lvis.json", {"images": [{"neg_category_ids": [1]}], "annotations": []})
    write_json(folder / "package.json", {"name": "web"})
    write_json(folder / "captions.json", {"annotations": [{"caption": "x"}], "images": []})
    (folder / "notes.txt").write_text("x")
    (folder / "cc.tsv").write_text("a\tb.jpg\n")
    found, skipped = registry.discover(folder)
    assert {kind: sorted(path.name for path in paths) for kind, paths in found.items()} == {
        "detection": ["instances_train.json"],
        "grounding": ["phrases_train.json"],
        "image_text": ["captions.json", "cc.tsv", "pairs.jsonl"],
    }
    reasons = {path.name: reason for path, reason in skipped.items()}
    assert set(reasons) == {"instances_val.json", "lvis.json", "package.json"}
    assert "evaluation" in reasons["instances_val.json"]
    with pytest.raises(UserError, match="no such directory"):
        registry.discover(folder / "none")


def test_a_file_of_another_kind(folder):
    images = ImageFolder(folder / "images")
    with pytest.raises(
        UserError, match="its fields are those of MDETR, but detection data must be COCO instances"
    ):
        registry.open_archives([folder / "annotations" / "phrases_train.json"], images, "detection")
    with pytest.raises(UserError, match="those of COCO instances, but image_text data"):
        registry.open_archives(
            [folder / "annotations" / "instances_train.json"], images, "image_text"
        )
    bad = folder / "bad.json"
    bad.write_text('{"images": [')
    with pytest.raises(UserError, match="line 1, column 13: not valid JSON"):
        registry.open_archives([bad], images, "detection")


def run(*arguments) -> int:
    return door.main([*map(str, arguments), "--jobs=1"])


def test_command_custom_and_again(folder, spacy_model, capsys):
    arguments = ("custom", f"--from={folder}", f"--to={folder / 'out'}")
    assert run(*arguments) == 0
    counts = {}
    for kind in ("detection", "grounding", "image_text"):
        source = Source.open(folder / "out" / kind)
        assert source.kind == kind and source.name == f"out_{kind}"
        counts[kind] = len(source)
    assert counts == {"detection": 4, "grounding": 8, "image_text": 8}
    assert "records" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    assert run(*arguments) == 0
    assert capsys.readouterr().out.count("already prepared") == 3
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}


def test_command_other_inputs(folder, capsys):
    arguments = ["coco", f"--from={folder}", f"--to={folder / 'out'}"]
    assert run(*arguments) == 0
    write_json(folder / "annotations" / "instances_train.json", coco(["0.jpg", "1.jpg"]))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and error.count("\n") == 1 and "--overwrite" in error
    assert len(Source.open(folder / "out")) == 4
    assert run(*arguments, "--overwrite") == 0
    assert len(Source.open(folder / "out")) == 2


def test_command_where_an_older_format_lies(folder, capsys):
    arguments = ["coco", f"--from={folder}", f"--to={folder / 'out'}"]
    assert run(*arguments) == 0
    info = folder / "out" / "info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "format": 1}))
    assert run(*arguments) == 2
    assert "has format 1, but this version reads 2" in (error := capsys.readouterr().err)
    assert error.endswith(f"--to={folder / 'out'} --overwrite`.\n")
    assert run(*arguments, "--overwrite") == 0
    assert len(Source.open(folder / "out")) == 4


def test_command_one_kind_and_named_files(folder):
    base = (f"--from={folder}", f"--images={folder / 'images'}")
    named = "--grounding=annotations/phrases_train.json"
    assert run("custom", *base, f"--to={folder / 'a'}", named) == 0
    assert [path.name for path in (folder / "a").iterdir()] == ["grounding"]
    path = write_json(folder / "elsewhere" / "instances_val.json", coco(["0.jpg", "1.jpg"]))
    assert run("coco", *base, f"--to={folder / 'b'}", f"--annotations={path}") == 0
    to = f"--to={folder / 'c'}"
    assert run("goldg", *base, to, "--name=flickr") == 2  # no list of the images that are COCO's
    assert run("goldg", *base, to, "--name=flickr", "--keep_coco") == 0
    assert Source.open(folder / "c").name == "flickr"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("coco", "--from=nowhere", "--to=out"), "nowhere: no such directory"),
        (("coco", "--from=.", "--to=out", "--annotations=no.json"), "no.json: no such file"),
        (("goldg", "--from=images", "--to=out"), "no grounding file for training"),
        (("custom", "--from=images", "--to=out"), "--detection=FILE"),
        (("coco", "--from=.", "--to=out", "--images=nowhere"), "--images=DIR"),
        (("coco", "--from=.", "--to=images"), "not a prepared source"),
        (("coco", "--from=.", "--to=images", "--overwrite"), "not a prepared source"),
        (("image_text", "--from=.", "--to=out", "--spacy_model=xx_none"), "xx_none"),
        (("image_text", "--from=.", "--to=out", "--phrases=-1"), "--phrases=-1"),
        (("index", "--from=images"), "dataset_info.json"),
        (("image_text", "--from=.", "--to=out", "--store_side=3"), "--store_side=3"),
        (("symbols", "--to=out", "--option=size=3"), "unknown option"),
        (("symbols", "--to=out", "--option=novel=many"), "like the default, 45"),
    ],
)
def test_command_bad_input(folder, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(folder)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert len(list((folder / "images").iterdir())) == 4  # nobody's files were touched


def test_command_symbols(tmp_path, spacy_model, capsys):
    few = [
        f"--option={split}_scenes=6" for split in ("detection", "grounding", "image_text", "val")
    ]
    assert run("symbols", f"--to={tmp_path / 's'}", "--seed=3", *few) == 0
    for kind in ("detection", "grounding", "image_text"):
        source = Source.open(tmp_path / "s" / kind)
        assert len(source) >= 6 and source.kind == kind
        assert not [reason for reason in source.info["dropped"] if reason.startswith("images")]
    assert (tmp_path / "s" / "archives" / "annotations" / "lvis_val.json").is_file()
    capsys.readouterr()
    assert run("symbols", f"--to={tmp_path / 's'}", "--seed=3", *few) == 0
    assert capsys.readouterr().out.count("already prepared") == 3


def test_help_of_every_command(capsys):
    commands = [*registry.SOURCES, "custom", "symbols", "concepts", "index", "minival"]
    assert set(commands) == set(door.EXAMPLES)
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        with pytest.raises(SystemExit) as stopped:
            door.main(arguments)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--detection" in printed and "448" in printed
    assert all(f"detclip prepare {name} -" in printed for name in commands)


@pytest.mark.parametrize("command", list(door.EXAMPLES))
def test_examples_of_the_help_are_valid(command):
    arguments = door.EXAMPLES[command].replace("\\\n", " ").split()
    door.build_parser().parse_args([command, *arguments])


def test_old_flags_name_the_new_ones(capsys):
    for arguments, new in (
        (("goldg", "--keep-coco"), "--keep_coco"),
        (("custom", "--image-text=a"), "--image_text"),
        (("image_text", "--store-side=448"), "--store_side"),
        (("concepts", "--min-count=4"), "--min_count"),
    ):
        with pytest.raises(SystemExit):
            door.main([*arguments, "--from=a", "--to=b"])
        assert f"is now {new}" in capsys.readouterr().err


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the real photos are not at {PHOTOS}")
def test_real_photos(tmp_path, spacy_model):
    """All three kinds of real annotations; of the photos every tenth, to be quick."""
    archive = tmp_path / "photos"
    (archive / "annotations").mkdir(parents=True)
    (archive / "images").symlink_to(PHOTOS / "images")
    boxes = {}
    for name in ("instances_train.json", "grounding_derived_train.json", "captions_train.json"):
        document = json.loads((PHOTOS / "annotations" / name).read_text())
        document["images"] = document["images"][::10]
        chosen = {entry["id"] for entry in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in chosen]
        boxes[name] = sum(not a.get("iscrowd", 0) for a in document["annotations"])
        write_json(archive / "annotations" / name, document)
    rows = (PHOTOS / "annotations" / "image_text.jsonl").read_text().splitlines()[::10]
    (archive / "annotations" / "image_text.jsonl").write_text("\n".join(rows))
    assert run("custom", f"--from={archive}", f"--to={tmp_path / 'out'}") == 0
    detection = Source.open(tmp_path / "out" / "detection")
    grounding = Source.open(tmp_path / "out" / "grounding")
    pairs = Source.open(tmp_path / "out" / "image_text")
    assert len(detection) == 25 and len(detection.keys) == 80 and len(grounding) == 43
    assert sum(r["count"] for r in detection.concepts) == boxes["instances_train.json"]
    assert sum(r["count"] for r in grounding.concepts) == boxes["grounding_derived_train.json"]
    assert len(pairs) == 5 * len(rows) + boxes["captions_train.json"]
    assert all(set(source.info["dropped"]) <= {"boxes: crowd"} for source in (detection, grounding))
    phrases_a_caption = np.diff(pairs.positives_offsets) - 1
    assert 2 < phrases_a_caption.mean() < 6 and phrases_a_caption.max() <= 7
