"""What a set of annotations means: ids, pictures and names given twice, roots, placeholders."""

import pytest
from miniature_archives import write_images, write_json

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.sources import coco as coco_source
from detclipv2_jax.data.prepare.sources import conceptual_captions, goldg


def box(image, category=1, xywh=(5, 4, 20, 10), **more):
    return {"id": 7, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


def image(image_id, name, **more):
    return {"id": image_id, "file_name": name, "height": 40, "width": 60, **more}


def categories(*names):
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


@pytest.fixture
def read(folder):
    def run(images, annotations, names=("cat", "dog"), **options):
        names = categories(*names) if isinstance(names[0], str) else list(names)
        content = {"images": images, "annotations": annotations, "categories": names}
        path = write_json(folder / "file.json", content)
        archive = coco_source.read(path, ImageFolder(folder / "images"), **options)
        return archive, list(archive.examples)

    return run


def boxes_of(examples):
    return {e.image_id: [(box.name, box.xywh) for box in e.boxes] for e in examples}


# ---- Ids.


def test_one_id_for_two_files_drops_both_with_their_boxes(read):
    """Nobody can tell on which of the two a box was drawn."""
    pictures = [image(1, "0.jpg"), image(1, "1.jpg"), image(1, "2.jpg"), image(2, "2.jpg")]
    archive, examples = read(pictures, [box(1), box(1, 2), box(2)])
    assert boxes_of(examples) == {"2": [("cat", (5, 4, 20, 10))]}
    assert archive.drops.dropped == {
        "images: one id for two files": 3,
        "boxes: image id of two files": 2,
    }
    sentence = archive.drops.explained["images: one id for two files"][0]
    assert '"0.jpg"' in sentence and '"1.jpg"' in sentence


@pytest.mark.parametrize("name", ["0.jpg", "./0.jpg", "x/../0.jpg"])
def test_one_id_twice_for_one_file_is_one_image(read, name):
    archive, examples = read([image(1, "0.jpg"), image(1, name)], [box(1), box(1, 2)])
    assert len(boxes_of(examples)["1"]) == 2
    assert archive.drops.dropped == {"images: entry given twice": 1}


def test_one_id_for_the_same_name_in_two_of_cocos_folders(read):
    urls = [f"http://images.cocodataset.org/{split}/0.jpg" for split in ("train2017", "val2017")]
    _, examples = read([image(1, "0.jpg", coco_url=url) for url in urls], [box(1)])
    assert not examples


def test_one_id_for_two_files_in_captions_and_grounding(folder):
    pictures = [image(1, "0.jpg", caption="a cat"), image(1, "1.jpg", caption="a cat")]
    notes = [box(1, tokens_positive=[[2, 5]], caption="a cat")]
    path = write_json(
        folder / "file.json", {"images": pictures, "annotations": notes, "categories": []}
    )
    for reader, what in (
        (goldg.read, "boxes"),
        (conceptual_captions.read_coco_captions, "captions"),
    ):
        archive = reader(path, ImageFolder(folder / "images"))
        assert not list(archive.examples)
        assert archive.drops.dropped["images: one id for two files"] == 2
        assert archive.drops.dropped[f"{what}: image id of two files"] == 1


def test_one_file_under_two_ids_is_one_image_with_the_boxes_of_both(read):
    pictures = [image(1, "0.jpg"), image(2, "1.jpg"), image(3, "images/0.jpg")]
    archive, examples = read(pictures, [box(1), box(2), box(3), box(3, 2)])
    one = ("cat", (5, 4, 20, 10))
    assert boxes_of(examples) == {"1": [one, ("dog", (5, 4, 20, 10))], "2": [one]}
    assert archive.drops.dropped == {
        "images: the same picture came before": 1,
        "boxes: given twice": 1,
    }
    (sentence,) = archive.drops.explained["images: the same picture came before"]
    assert "image 3 is the file of image 1" in sentence


def test_entries_of_one_file_with_two_sizes_stay_apart(read):
    """The one that does not fit the file is dropped when it is opened, with its boxes."""
    _, examples = read([image(1, "0.jpg"), image(2, "0.jpg") | {"width": 30}], [box(1), box(2)])
    assert [example.size for example in examples] == [(40, 60), (40, 30)]


def test_equal_boxes_count_once(read):
    notes = [box(1), box(1), box(1, 2), box(1, xywh=(5, 4, 20, 11))]
    archive, examples = read([image(1, "0.jpg")], notes)
    assert len(examples[0].boxes) == 3
    assert archive.drops.dropped == {"boxes: given twice": 1}


# ---- Categories.


def test_one_category_id_with_two_names_is_refused_with_both(read):
    names = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]
    with pytest.raises(UserError, match=r'categories\[1\].*3 is already used.*"cat" and "dog"'):
        read([image(1, "0.jpg")], [], names)


def test_one_category_given_twice_is_one(read):
    names = [{"id": 3, "name": "cat"}, {"id": 3, "name": "Cat "}]
    assert read([image(1, "0.jpg")], [box(1, 3)], names)[0].names == ("cat",)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Polish", "polish"),
        ("traffic_light", "Traffic  Light"),
        ("cat", "cat "),
        ("salt &amp; pepper", "salt & pepper"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_spellings_of_one_name_are_joined_and_told(read, first, second):
    archive, examples = read(
        [image(1, "0.jpg")], [box(1, 1), box(1, 2), box(1, 2, (1, 1, 9, 9))], (first, second)
    )
    assert archive.drops.changed == {"names: the same as another": 1}
    (sentence,) = archive.drops.explained["names: the same as another"]
    assert "(id 1)" in sentence and "(id 2)" in sentence
    assert len(set(archive.names)) == 1
    assert len(examples[0].boxes) == 2  # the box with both spellings is one box


@pytest.mark.parametrize(("first", "second"), [("hot-dog", "hot dog"), ("cat", "cats")])
def test_names_that_nearly_agree_stay_two_and_are_noted(read, first, second):
    archive, _ = read([image(1, "0.jpg")], [box(1, 1), box(1, 2)], (first, second))
    assert archive.names == (first, second)
    assert archive.drops.noted == {"names: nearly the same as another": 1}


def test_different_things_are_not_noted(read):
    names = ("bow (weapon)", "bow (decorative)", "glass", "glasses", "bus", "cat")
    assert not read([image(1, "0.jpg")], [], names)[0].drops.noted


def test_names_with_equal_tokens_are_noted(read):
    long = "a very long name of a thing that has many more words than the model reads"
    archive, _ = read([image(1, "0.jpg")], [], (f"{long} red", f"{long} blue"))
    assert archive.drops.noted == {"names: equal for the model": 1}


@pytest.mark.parametrize("name", ["0", "12", "class_0", "Label 3", "unknown", "N/A", "-"])
def test_names_that_say_nothing_are_noted(read, name):
    archive, examples = read([image(1, "0.jpg")], [box(1, 1)], (name, "cat"))
    assert archive.drops.noted == {"names: no word for an object": 1}
    assert len(examples[0].boxes) == 1 and len(archive.names) == 2


def rooted(root="animals", of="animals", **more):
    root = {"id": 0, "name": root, "supercategory": "none", **more}
    kinds = [{"id": n, "name": name, "supercategory": of} for n, name in ((1, "cat"), (2, "dog"))]
    return [root, *kinds]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (rooted(), "root"),
        (rooted("Animals", "animals"), "root"),
        (rooted("pet_animals", "pet animals"), "root"),
        (rooted(id=5), "root"),
        (rooted("objects", "none"), "root"),
        (rooted("background", "thing"), "placeholder"),
        (rooted("__background__", ""), "placeholder"),
        (rooted("N/A", None, id=8), "placeholder"),
    ],
)
def test_a_root_or_placeholder_without_boxes_is_no_name(read, names, reason):
    archive, _ = read([image(1, "0.jpg")], [box(1, 1)], names)
    assert archive.names == ("cat", "dog")
    assert archive.drops.dropped == {f"names: {reason} without boxes": 1}


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (rooted(), [box(1, 0), box(1, 1)]),  # a parent with boxes of its own
        (rooted(), [box(1, 0, iscrowd=1)]),
        (rooted("animals", "none"), [box(1, 1)]),  # a class that this split happens to lack
        (rooted("objects", "none", id=3), [box(1, 1)]),
        ([{"id": 1, "name": "cat", "supercategory": "cat"}], []),  # COCO's person, Roboflow's only
    ],
)
def test_other_categories_without_boxes_stay(read, names, notes):
    assert len(read([image(1, "0.jpg")], notes, names)[0].names) == len(names)


def test_a_root_that_an_image_is_listed_to_lack_stays(read):
    pictures = [image(1, "0.jpg", neg_category_ids=[0], not_exhaustive_category_ids=[])]
    archive, examples = read(pictures, [box(1, 1)], rooted())
    assert archive.names == ("animals", "cat", "dog") and examples[0].absent == ("animals",)


def test_a_turned_box_is_counted_and_becomes_the_upright_box_around_it(read):
    turned = box(1, xywh=(10, 10, 20, 10), attributes={"occluded": False, "rotation": 90.0})
    archive, (one,) = read([image(1, "0.jpg")], [turned, box(1, attributes={"rotation": 0.0})])
    assert [b.xywh for b in one.boxes] == [(15, 5, 10, 20), (5, 4, 20, 10)]
    reason = "boxes: upright around a turned box"
    assert archive.drops.changed[reason] == 1
    assert "turned by 90 degrees (attributes.rotation)" in archive.drops.explained[reason][0]
