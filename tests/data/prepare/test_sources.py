"""Each reader on a small archive of its format, whole and broken."""

import copy
import gzip
import json

import numpy as np
import pytest
from miniature_archives import coco, image_entries, mdetr, write_images, write_json

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.sources import coco as coco_source
from detclipv2_jax.data.prepare.sources import conceptual_captions, goldg


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


def images(folder) -> ImageFolder:
    return ImageFolder(folder / "images")


def read_coco(folder, document):
    archive = coco_source.read(write_json(folder / "coco.json", document), images(folder))
    return archive, list(archive.examples)


def test_coco(folder):
    archive, examples = read_coco(folder, coco(["0.jpg", "1.jpg", "2.jpg"]))
    assert (archive.kind, archive.total) == ("detection", 3)
    assert archive.names == ("Cat", "Traffic  Light", "bus")
    assert [len(example.boxes) for example in examples] == [2, 2, 0]  # the empty one stays
    first = examples[0]
    assert first.image.path == folder / "images" / "0.jpg"
    assert (first.image_id, first.size, first.caption) == ("0", (40, 60), "")
    assert first.boxes[0].xywh == (5.0, 4, 20, 10.5) and first.boxes[0].name == "Cat"
    assert archive.drops.dropped == {"boxes: crowd": 1}


def test_coco_names_of_lvis_and_its_coco_url(folder):
    document = coco(["0.jpg", "1.jpg"])
    document["categories"][0]["name"] = "mouse_(computer_equipment)"
    for entry in document["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/train2017/{entry.pop('file_name')}"
    archive, examples = read_coco(folder, document)
    assert archive.names[0] == "mouse (computer equipment)"
    assert examples[1].image.path == folder / "images" / "1.jpg"


BROKEN_ENTRIES = {
    "unknown category": ({"category_id": 4}, "boxes: unknown category", '"category_id" 4'),
    "unknown image": ({"image_id": "x"}, "boxes: unknown image", '"image_id" "x"'),
    "no bbox": ({"bbox": None}, "boxes: malformed entry", "annotations[0].bbox is null"),
    "three numbers": ({"bbox": [1, 2, 3]}, "boxes: malformed entry", "[1, 2, 3]"),
    "words": ({"bbox": [1, 2, "wide", 3]}, "boxes: malformed entry", "not four numbers"),
    "list as id": ({"category_id": [3]}, "boxes: malformed entry", "].category_id is [3], not a"),
    "object as image": ({"image_id": {}}, "boxes: malformed entry", "[0].image_id is {}, not a"),
    "NaN as id": ({"image_id": float("nan")}, "boxes: malformed entry", ".image_id is NaN, not a"),
    "true as id": ({"category_id": True}, "boxes: malformed entry", "].category_id is true, not"),
    "half an id": ({"category_id": 1.5}, "boxes: malformed entry", "].category_id is 1.5, not a"),
    "crowd of 2": ({"iscrowd": 2}, "boxes: malformed entry", "].iscrowd is 2, not 0 or 1"),
    "perhaps": ({"iscrowd": "perhaps"}, "boxes: malformed entry", '].iscrowd is "perhaps", not 0'),
    "a box of true": ({"bbox": [1, 2, True, 4]}, "boxes: malformed entry", "[1, 2, true, 4], not"),
}


@pytest.mark.parametrize("case", BROKEN_ENTRIES)
def test_coco_broken_annotation(folder, case):
    change, reason, expected = BROKEN_ENTRIES[case]
    document = coco(["0.jpg", "1.jpg", "2.jpg"])
    document["annotations"][0] |= change
    archive, examples = read_coco(folder, document)
    assert archive.drops.dropped[reason] == 1
    (sentence,) = archive.drops.explained[reason]
    assert expected in sentence and str(folder / "coco.json") in sentence
    assert [len(example.boxes) for example in examples] == [1, 2, 0]


@pytest.mark.parametrize("entry", [7, None, [], {}, "box"])
def test_coco_annotation_that_is_not_an_object(folder, entry):
    document = coco(["0.jpg", "1.jpg"])
    document["annotations"][0] = entry
    archive, examples = read_coco(folder, document)
    assert archive.drops.dropped["boxes: malformed entry"] == 1
    assert [len(example.boxes) for example in examples] == [1, 0]


def test_coco_broken_images(folder):
    document = coco(["0.jpg", "1.jpg", "2.jpg"])
    document["images"] += [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 10},
        {"id": 11, "file_name": "gone.jpg"},
        {"id": 12, "file_name": 4},
        {"id": 13, "file_name": "1.jpg", "height": "tall", "width": 3},
        {"id": 14, "file_name": "1.jpg", "height": 0, "width": 3},
        {"id": 15, "file_name": "1.jpg", "height": float("inf"), "width": 3},
        {"id": 16, "file_name": "http://x.org/1.jpeg"},
        {"id": 17, "file_name": "a" * 5000},
        {"id": 18, "file_name": "2.jpg\0"},
        "1.jpg",
    ]
    archive, examples = read_coco(folder, document)
    assert [example.image_id for example in examples] == ["0", "1", "2"]
    assert archive.drops.dropped == {
        "boxes: crowd": 1,
        "images: entry given twice": 1,
        "images: malformed entry": 6,
        "images: missing": 4,
    }
    explained = archive.drops.explained
    assert "images[3]" in explained["images: entry given twice"][0]
    assert "].file_name is missing" in explained["images: malformed entry"][0]
    assert "gone.jpg under" in explained["images: missing"][0]
    assert "a URL, not a file" in explained["images: missing"][1]
    assert all(len(sentences) <= 3 for sentences in explained.values())


def test_strings_of_numbers_and_sizes_that_are_not_told(folder):
    document = coco(["0.jpg", "1.jpg"])
    document["images"][0] |= {"height": "40", "width": "60.0"}
    del document["images"][1]["height"]
    document["annotations"][0]["bbox"] = ["1", "2", "3", "4.5"]
    _, examples = read_coco(folder, document)
    assert [example.size for example in examples] == [(40, 60), None]
    assert examples[0].boxes[0].xywh == (1, 2, 3, 4.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "coco.json: empty."),
        ("<html>\n404", "line 1, column 1: not valid JSON"),
        ('{"images": [],\n "annotations": [', "line 2"),
        ("[]", 'holds a JSON list, expected an object with the lists "images"'),
        ("7", "holds a JSON number, expected an object"),
        ('{"images": [], "categories": []}', 'no list "annotations"'),
        ('{"images": {}, "annotations": [], "categories": []}', 'no list "images"'),
        ('{"images": [], "annotations": []}', 'no list "categories"'),
        ('{"images": [], "annotations": [], "categories": [3]}', "categories[0]"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "categories[0]"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "_"}]}', "no word"),
        ('{"images": [], "annotations": [], "categories": [{"name": "a"}]}', "].id is missing"),
        (
            '{"images": [], "annotations": [], "categories": '
            '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "already used",
        ),
        ("[" * 100_000, "holds a JSON list"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_of_another_format_is_refused(folder, text, expected):
    path = folder / "coco.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        coco_source.read(path, images(folder))
    sentence = str(caught.value)
    assert expected in sentence and str(path) in sentence and "\n" not in sentence


def test_binary_and_missing_files(folder):
    path = folder / "coco.json"
    path.write_bytes(b"\xff\xfe\x80\x81" * 10)
    for reader in (coco_source.read, goldg.read, conceptual_captions.read_coco_captions):
        with pytest.raises(UserError, match="not valid JSON|not UTF-16 text"):
            reader(path, images(folder))
        with pytest.raises(UserError, match="nowhere.json: no such file"):
            reader(folder / "nowhere.json", images(folder))
        with pytest.raises(UserError, match="cannot be read"):
            reader(folder, images(folder))


def test_image_folder(folder, tmp_path):
    (folder / "images" / "v1" / "patch8").mkdir(parents=True)
    (folder / "images" / "v1" / "patch8" / "0.jpg").write_bytes(b"other")
    roots = ImageFolder(folder / "none", folder / "images", folder)
    assert roots.find("0.jpg").path == folder / "images" / "0.jpg"
    assert roots.find("v1/patch8/0.jpg").path.read_bytes() == b"other"
    assert roots.find("images/v1/patch8/0.jpg").path.read_bytes() == b"other"
    assert roots.find("elsewhere/patch9/1.jpg").path == folder / "images" / "1.jpg"
    assert roots.find(str(folder / "images" / "2.jpg")).path == folder / "images" / "2.jpg"
    for name in ("", ".", "v1", "9.jpg", ".."):
        assert roots.find(name).path is None
    with pytest.raises(UserError, match=r"none: no such directory\. .*--images"):
        ImageFolder(folder / "none")


def test_goldg(folder):
    path = write_json(folder / "mdetr.json", mdetr(["0.jpg", "1.jpg"]))
    archive = goldg.read(path, images(folder))
    examples = list(archive.examples)
    assert (archive.kind, archive.total, archive.names) == ("grounding", 4, ())
    assert [example.size for example in examples] == [(40, 60)] * 4
    names = [[box.name for box in example.boxes] for example in examples]
    assert names == [["red cat", "dogs", "red dogs"], ["cat"]] * 2
    assert [e.image.path.name for e in examples] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]
    assert not archive.drops.dropped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens_positive": []}, "boxes: no phrase"),
        ({"tokens_positive": [[0, 3]]}, "boxes: no phrase"),  # "The"
        ({"tokens_positive": [[0, 99]]}, "boxes: malformed entry"),
        ({"tokens_positive": [3, 9]}, "boxes: malformed entry"),
        ({"tokens_positive": [["a", "b"]]}, "boxes: malformed entry"),
        ({"tokens_positive": None}, "boxes: malformed entry"),
        ({"tokens_positive": [[0.5, 3]]}, "boxes: malformed entry"),
        ({"bbox": [1, 2]}, "boxes: malformed entry"),
        ({"image_id": 77}, "boxes: unknown image"),
        ({"image_id": []}, "boxes: malformed entry"),
    ],
)
def test_goldg_broken_annotation(folder, change, reason):
    document = mdetr(["0.jpg"])
    document["annotations"][0] |= change
    archive = goldg.read(write_json(folder / "mdetr.json", document), images(folder))
    assert [len(example.boxes) for example in archive.examples] == [2, 1]
    assert archive.drops.dropped == {reason: 1}
    assert "annotation" in archive.drops.explained[reason][0]


def test_goldg_without_captions_or_spans(folder):
    document = mdetr(["0.jpg"])
    del document["images"][1]["caption"]
    del document["annotations"][0]["tokens_positive"]
    archive = goldg.read(write_json(folder / "mdetr.json", document), images(folder))
    list(archive.examples)
    assert archive.drops.dropped == {"boxes: malformed entry": 1, "boxes: no caption": 1}
    assert "no field 'tokens_positive'" in archive.drops.explained["boxes: malformed entry"][0]


def lines(folder, *rows, name="pairs.jsonl"):
    path = folder / name
    path.write_bytes(
        b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    )
    return path


def test_json_lines(folder):
    path = lines(
        folder,
        {"image": "0.jpg", "caption": "A cat."},
        b"",
        {"file_name": "1.jpg", "captions": ["A dog", "one dog"]},
        {"path": "2.jpg", "text": "Straße"},
    )
    archive = conceptual_captions.read_json_lines(path, images(folder))
    examples = list(archive.examples)
    assert [(e.image_id, e.caption) for e in examples] == [
        ("0.jpg", "A cat."),
        ("1.jpg#0", "A dog"),
        ("1.jpg#1", "one dog"),
        ("2.jpg", "Straße"),
    ]
    assert archive.kind == "image_text" and archive.total == 3 and not archive.drops.dropped
    assert all(e.size is None and e.boxes == () for e in examples)


def test_json_lines_total_counts_the_captions_of_a_line(folder):
    rows = [{"image": f"{i}.jpg", "captions": ["a", "b", "c"]} for i in range(3)]
    archive = conceptual_captions.read_json_lines(lines(folder, *rows), images(folder))
    assert archive.total == len(list(archive.examples)) == 9


@pytest.mark.parametrize(
    ("row", "reason", "expected"),
    [
        (b"{'image': 3}", "images: malformed line", "not valid JSON"),
        (b"[1, 2]", "images: malformed line", "[1, 2] is not an object"),
        (b"\xff\xfe\x00", "images: malformed line", "line 2"),
        ({"caption": "x"}, "images: malformed line", "no field image or file_name"),
        ({"image": 5, "caption": "x"}, "images: malformed line", "no field image"),
        ({"image": "0.jpg"}, "images: malformed line", "no field caption"),
        ({"image": "9.jpg", "caption": "x"}, "images: missing", "no file 9.jpg"),
        ({"image": "0.jpg", "caption": "  "}, "captions: empty", 'caption is "  "'),
        ({"image": "0.jpg", "caption": None}, "images: malformed line", "no field caption"),
        ({"image": "0.jpg", "captions": [3]}, "captions: empty", "is 3"),
        ({"image": "0.jpg", "caption": "nan"}, "captions: empty", "stands for a missing one"),
        ({"image": "0.jpg", "caption": " N/A "}, "captions: empty", "stands for a missing one"),
        ({"image": "0.jpg", "caption": float("nan")}, "captions: empty", "is NaN, not a text"),
        ({"image": "a cat", "caption": "1.jpg"}, "images: malformed line", "caption<TAB>image"),
    ],
)
def test_json_lines_broken_line(folder, row, reason, expected):
    path = lines(folder, {"image": "0.jpg", "caption": "a"}, row, {"image": "1.jpg", "text": "b"})
    archive = conceptual_captions.read_json_lines(path, images(folder))
    assert [example.caption for example in archive.examples] == ["a", "b"]
    assert archive.drops.dropped == {reason: 1}
    (sentence,) = archive.drops.explained[reason]
    assert expected in sentence and f"{path}, line 2" in sentence


def test_byte_order_mark_and_windows_lines(folder):
    path = folder / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"image": "0.jpg", "caption": "a"}\r\n\r\n')
    archive = conceptual_captions.read_json_lines(path, images(folder))
    assert [e.caption for e in archive.examples] == ["a"]


def test_tsv(folder):
    path = folder / "cc.tsv"
    path.write_text(
        "a cat , on a mat\t0.jpg\r\nno image here\n\tx.jpg\n\t1.jpg\n"
        "a bus\thttp://x.org/9.jpg?size=l\ntwo dogs\timages/2.jpg\textra\n"
    )
    archive = conceptual_captions.read_tsv(path, images(folder))
    examples = list(archive.examples)
    assert [(e.caption, e.image.path.name) for e in examples] == [
        ("a cat , on a mat", "0.jpg"),
        ("two dogs", "2.jpg"),
    ]
    assert archive.total == 6
    assert archive.drops.dropped == {
        "images: malformed line": 1,
        "images: missing": 2,
        "captions: empty": 1,
    }


def test_tsv_with_the_columns_swapped(folder):
    path = folder / "cc.tsv"
    path.write_text('0.jpg\ta cat\n1.jpg\ta "big" dog\n9.jpg\tnot there\n')
    archive = conceptual_captions.read_tsv(path, images(folder))
    assert list(archive.examples) == []
    assert archive.drops.dropped == {"images: malformed line": 2, "images: missing": 1}
    why = archive.drops.explained["images: malformed line"][0]
    assert why == (
        f"{path}, line 1: the image file stands where the caption belongs: caption<TAB>image file"
    )


def test_empty_lists(folder):
    (folder / "none.tsv").write_text("")
    for read in (conceptual_captions.read_tsv, conceptual_captions.read_json_lines):
        archive = read(folder / "none.tsv", images(folder))
        assert archive.total == 0 and list(archive.examples) == []
        with pytest.raises(UserError, match="no.txt: no such file"):
            read(folder / "no.txt", images(folder))


def test_coco_captions(folder):
    annotations = [
        {"id": 5, "image_id": 0, "caption": "A cat"},
        {"id": 6, "image_id": 0, "caption": "one cat"},
        {"id": 7, "image_id": 1, "caption": ""},
        {"id": 8, "image_id": 44, "caption": "lost"},
        {"id": 9, "image_id": 2},
        {"id": 10, "image_id": [2], "caption": "x"},
        "caption",
    ]
    document = {"images": image_entries(["0.jpg", "1.jpg", "2.jpg"]), "annotations": annotations}
    path = write_json(folder / "captions.json", document)
    archive = conceptual_captions.read_coco_captions(path, images(folder))
    examples = list(archive.examples)
    assert [(e.image_id, e.caption, e.size) for e in examples] == [
        ("0#5", "A cat", (40, 60)),
        ("0#6", "one cat", (40, 60)),
    ]
    assert archive.drops.dropped == {
        "captions: empty": 1,
        "captions: unknown image": 1,
        "captions: malformed entry": 3,
    }


def test_nothing_but_plain_data_is_read(folder):
    """NaN passes the reader (JSON of exporters has it) and is left to the check of boxes."""
    document = coco(["0.jpg", "1.jpg"])
    document["annotations"][0]["bbox"] = [float("nan"), 1, 2, 3]
    _, examples = read_coco(folder, document)
    assert np.isnan(examples[0].boxes[0].xywh[0])


def test_boxes_that_are_probably_corners_are_noted(folder):
    document = coco(["0.jpg", "1.jpg", "2.jpg"])
    for annotation in document["annotations"]:
        annotation |= {"bbox": [35, 25, 55, 38], "iscrowd": "0.0"}  # of 60 x 40 pixels
    archive, examples = read_coco(folder, document)
    (sentence,) = archive.drops.explained["boxes: perhaps corners"]
    assert "all would fit as [x_min, y_min, x_max, y_max]" in sentence
    assert any(len(example.boxes) for example in examples)
    document["annotations"][0]["bbox"] = [35, 25, 70, 38]
    archive, _ = read_coco(folder, document)
    assert "boxes: perhaps corners" not in archive.drops.noted


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gzip"])
@pytest.mark.parametrize("form", ["coco", "lines", "tsv"])
def test_encodings_of_annotation_files(folder, form, encoding):
    names = ["0.jpg", "1.jpg"]
    text, suffix, read = {
        "coco": (json.dumps(coco(names)), ".json", coco_source.read),
        "lines": (
            "".join(json.dumps({"image": n, "caption": "ein Käfer"}) + "\n" for n in names),
            ".jsonl",
            conceptual_captions.read_json_lines,
        ),
        "tsv": (
            "".join(f"ein Käfer\t{n}\r\n" for n in names),
            ".tsv",
            conceptual_captions.read_tsv,
        ),
    }[form]
    data = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    path = folder / f"file{suffix}{'.gz' * (encoding == 'gzip')}"
    path.write_bytes(data)
    archive = read(path, images(folder))
    examples = list(archive.examples)
    assert len(examples) == 2 and archive.total == 2
    assert form == "coco" or {example.caption for example in examples} == {"ein Käfer"}


def test_ids_written_another_way_are_the_same_ids(folder):
    document = coco(["0.jpg", "1.jpg", "2.jpg"])
    wanted = [(e.image_id, e.boxes, e.size) for e in read_coco(folder, document)[1]]
    for spell in (str, float, lambda value: f"{value}.0"):
        other = copy.deepcopy(document)
        for row in other["annotations"]:
            row |= {"image_id": spell(row["image_id"]), "category_id": spell(row["category_id"])}
            row["iscrowd"] = spell(row.get("iscrowd", 0))
        for row in other["categories"]:
            row["id"] = spell(row["id"])
        archive, examples = read_coco(folder, other)
        assert [(e.image_id, e.boxes, e.size) for e in examples] == wanted
        assert archive.drops.dropped == {"boxes: crowd": 1}
