"""The counts that people check first: boxes, boxes per name, images without boxes."""

import contextlib
import io
from collections import Counter

import pytest
import shared_data
from miniature_archives import write_images, write_json
from pycocotools.coco import COCO
from test_annotation_sets import box, categories, image

from detclipv2_jax import prepare as door
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import statistics
from detclipv2_jax.data.prepare.report import boxes_per_name, format_report


def prepare(folder, to, *more):
    assert door.main(["custom", f"--from={folder}", f"--to={to}", "--jobs=1", *more]) == 0
    return Source.open(to / "detection")


def test_counts_are_those_of_pycocotools(tmp_path):
    photos = shared_data.folder("photos")
    file = photos / "annotations" / "instances_train.json"
    source = prepare(photos, tmp_path / "to", f"--detection={file}", "--validation=none")
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file))
    boxes = [one for one in theirs.anns.values() if not one["iscrowd"]]
    crowds = len(theirs.anns) - len(boxes)
    names = Counter(theirs.cats[one["category_id"]]["name"] for one in boxes)
    boxed = {one["image_id"] for one in boxes}
    values = statistics.index_statistics(source)
    assert values["all_boxes"] == source.info["boxes"] == len(boxes)
    assert source.info["dropped"] == {"boxes: crowd": crowds}
    assert Counter(values["boxes_per_name"]) == names
    assert values["images_without_boxes"] == len(theirs.imgs) - len(boxed)
    assert values["records"] == len(theirs.imgs)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "from", 3)
    return tmp_path / "from"


def test_the_report_of_three_names(folder, tmp_path):
    notes = [box(1), box(1, 2), box(2, 2)]
    content = {"images": [image(n, f"{n - 1}.jpg") for n in (1, 2, 3)], "annotations": notes}
    write_json(folder / "a.json", content | {"categories": categories("cat", "dog", "cow")})
    report = format_report(prepare(folder, tmp_path / "to"))
    assert "  boxes per name:              dog 2, cat 1\n" in report
    assert "  names without boxes:         1 (cow)" in report
    assert f"  of which without boxes{'':<14}{1:>10}\n  boxes{'':<31}{3:>10}\n" in report
    assert len(report.splitlines()) == 9


def test_the_report_of_many_names_stays_short(folder, tmp_path):
    names = [f"thing{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}x{n}x" for n in range(1203)]
    notes = [
        box(1 + n % 3, 1 + n, (k % 30, 5, 9, 9)) for n in range(1100) for k in range(1 + n % 12)
    ]
    content = {"images": [image(n, f"{n - 1}.jpg") for n in (1, 2, 3)], "annotations": notes}
    write_json(folder / "a.json", content | {"categories": categories(*names)})
    source = prepare(folder, tmp_path / "to")
    report = format_report(source)
    assert len(report.splitlines()) <= 12 and max(map(len, report.splitlines())) < 200
    rare = sum(1 + n % 12 < 10 for n in range(1100))
    assert f"names with under 10 boxes:   {rare:,}" in report
    assert "names without boxes:         103 (" in report
    assert sum(boxes_per_name(source).values()) == len(notes)
