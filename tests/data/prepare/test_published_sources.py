"""Every source in its original form on disk: read, and prepared."""

import collections
import json
import shutil
from pathlib import Path

import miniature_archives as miniature
import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.sources import coco, goldg, img2dataset, lvis, objects365, odinw
from detclipv2_jax.evaluation import coco as coco_evaluation
from detclipv2_jax.evaluation import lvis as lvis_evaluation

DETIC = Path(__file__).parents[4] / "shared/data/clip_text/Objects365_names_fix.csv"


def test_objects365_v2(tmp_path):
    path = miniature.objects365_v2(tmp_path)
    assert objects365.training_files(tmp_path) == [path]
    archive = objects365.read(path, ImageFolder(tmp_path))
    examples = list(archive.examples)
    assert archive.kind == "detection" and archive.total == 4
    assert archive.names == ("Person", "Monitor/TV", "Basket", "Balloon", "Formula 1")
    assert [example.image_id for example in examples] == ["1", "420917", "2000000"]
    assert examples[1].image.path == tmp_path / "train/patch8/objects365_v1_00420917.jpg"
    assert [len(example.boxes) for example in examples] == [2, 5, 1]
    assert examples[0].boxes[0].xywh == (4.5, 3.0000000001, 20.1, 14.95)
    assert examples[0].boxes[1].origin == "annotation 1"
    assert archive.drops.dropped == {"boxes: crowd": 1, "images: missing": 1}
    assert "patch16/objects365_v2_00908726.jpg" in archive.drops.explained["images: missing"][0]


@pytest.mark.parametrize("folder", ["images", "", "images/train"])
def test_objects365_v2_unpacked_otherwise(tmp_path, folder):
    path = miniature.objects365_v2(tmp_path)
    inner = "v1/patch8" if folder == "images" else "patch8"
    shutil.rmtree(tmp_path / "train")
    miniature.write_file(tmp_path / folder / inner / "objects365_v1_00420917.jpg")
    found = list(objects365.read(path, ImageFolder(tmp_path)).examples)
    assert [example.image_id for example in found] == ["420917"]


def test_objects365_v1(tmp_path):
    path = miniature.objects365_v1(tmp_path)
    assert objects365.training_files(tmp_path) == [path]
    archive = objects365.read(path, ImageFolder(tmp_path))
    examples = list(archive.examples)
    assert archive.names == ("Hami melon", "person")
    assert [[box.name for box in e.boxes] for e in examples] == [["person", "Hami melon"], []]
    assert not archive.drops.dropped


@pytest.mark.skipif(not DETIC.is_file(), reason=f"{DETIC} is not there")
def test_objects365_names_are_those_of_detic():
    rows = DETIC.read_text().splitlines()
    for published, corrected in (row.split(",")[1:] for row in rows):
        ours = objects365.NAMES.get(published.strip().lower(), published.strip())
        assert ours == corrected.strip() or published in ("Ballon", "Billards", "Noddles")


def test_objects365_without_a_training_file(tmp_path):
    path = miniature.objects365_v2(tmp_path)
    path.unlink()  # val's stays, and is not taken
    assert objects365.training_files(tmp_path) == []


def test_the_subset_depends_on_nothing_else(tmp_path):
    ids = list(range(5000))
    chosen = objects365.choose_ids(ids, count=1000, seed=0)
    assert len(chosen) == 1000
    assert chosen == objects365.choose_ids(ids[::-1], count=1000, seed=0)
    assert chosen > objects365.choose_ids(ids, count=999, seed=0)
    other = objects365.choose_ids(ids, count=1000, seed=1)
    assert 120 < len(chosen & other) < 280  # 200 by chance
    # Without some of the others it is the same, but for what fills their places.
    assert chosen - set(range(100)) <= objects365.choose_ids(ids[100:], count=1000, seed=0)
    assert objects365.choose_ids(ids, count=10_000, seed=0) == set(ids)
    assert objects365.choose_ids([], count=10, seed=0) == set()
    # Spread over the ids: a chi-square test of ten bins.
    bins = collections.Counter(number // 500 for number in chosen)
    assert sum((bins[b] - 100) ** 2 / 100 for b in range(10)) < 27.9  # 0.1 % of the time by chance
    # The rule is fixed for good: other machines and years must choose the same.
    first = objects365.choose_ids(range(1_000_000), count=5, seed=0)
    assert sorted(first) == [354137, 419750, 519054, 650130, 683191]


def test_the_subset_of_a_file(tmp_path):
    path = miniature.objects365_v2(tmp_path)
    archive = objects365.read(path, ImageFolder(tmp_path), subset=2)
    examples = list(archive.examples)
    expected = objects365.choose_ids([1, 420917, 908726, 2000000], count=2, seed=0)
    missing = archive.drops.dropped["images: missing"]
    assert {int(e.image_id) for e in examples} == expected - {908726}
    assert archive.total == 2 == len(examples) + missing
    assert archive.drops.dropped["images: not in the subset"] == 2
    # The boxes of what was left out are gone with it.
    assert "boxes: unknown image" not in archive.drops.dropped
    assert len(objects365.read(path, ImageFolder(tmp_path), subset=0).names) == 5


def test_goldg(tmp_path):
    flickr, mixed = miniature.goldg(tmp_path)
    assert goldg.training_files(tmp_path) == [flickr, mixed]
    archive = goldg.read_without_coco(flickr, ImageFolder(tmp_path))
    examples = list(archive.examples)
    assert [e.image.path for e in examples] == [tmp_path / "flickr30k_images/2354786.jpg"] * 2
    assert [e.size for e in examples] == [(40, 60)] * 2  # written as strings
    names = [[box.name for box in e.boxes] for e in examples]
    assert names == [["wet boys", "blue swimming suits"], ["boys", "suits"]]
    assert not archive.drops.dropped  # its number is that of a COCO image in Visual Genome
    archive = goldg.read_without_coco(mixed, ImageFolder(tmp_path))
    examples = list(archive.examples)
    assert [e.image.path for e in examples] == [tmp_path / "gqa/images/2331819.jpg"] * 2
    assert [box.name for box in examples[0].boxes] == ["man", "pink tie"]
    assert archive.drops.dropped == {
        "images: a COCO image": 1,
        "images: a COCO image in Visual Genome": 1,
    }
    explained = archive.drops.explained["images: a COCO image in Visual Genome"][0]
    assert "images[1]" in explained and "2354786.jpg" in explained


def test_goldg_with_coco(tmp_path):
    _, mixed = miniature.goldg(tmp_path)
    archive = goldg.read_without_coco(mixed, ImageFolder(tmp_path), keep_coco=True)
    places = [e.image.path.relative_to(tmp_path) for e in archive.examples]
    assert [str(place.parent) for place in places] == ["train2014"] + ["gqa/images"] * 3
    assert not archive.drops.dropped


def test_goldg_without_the_images_of_evaluation(tmp_path):
    _, mixed = miniature.goldg(tmp_path)
    evaluation = miniature.write_json(
        tmp_path / "lvis.json", {"images": [{"id": 318219}, None, {}]}
    )
    images = ImageFolder(tmp_path)
    archive = goldg.read_without_coco(mixed, images, exclude=[evaluation])
    assert [e.image_id for e in archive.examples] == ["0", "2", "3"]
    assert archive.drops.dropped == {"images: a COCO image in Visual Genome": 1}


def test_goldg_without_visual_genomes_list(tmp_path):
    flickr, mixed = miniature.goldg(tmp_path)
    (tmp_path / "image_data.json").unlink()
    images = ImageFolder(tmp_path)
    assert len(list(goldg.read_without_coco(flickr, images).examples)) == 2  # which needs none
    with pytest.raises(UserError, match="no image_data.json in it"):
        goldg.read_without_coco(mixed, images)
    for content in ({"image_id": 1}, [{"image_id": 1}], [3], [{"image_id": "x", "coco_id": 1}]):
        miniature.write_json(tmp_path / "image_data.json", content)
        with pytest.raises(
            UserError, match='image_data.json: not a list of images with "image_id"'
        ):
            goldg.read_without_coco(mixed, images)
    (tmp_path / "image_data.json").write_bytes(b"\xff[")
    with pytest.raises(UserError, match="image_data.json"):
        goldg.read_without_coco(mixed, images)
    without = mixed.rename(mixed.with_name("final_mixed_train_no_coco.json"))
    assert goldg.training_files(tmp_path) == [flickr, without]
    assert goldg.training_files(tmp_path / "gqa") == []


def test_coco(tmp_path):
    path = miniature.coco2017(tmp_path)
    archive = coco.read(path, ImageFolder(tmp_path))
    places = [e.image.path for e in archive.examples]
    assert places == [tmp_path / f"train2017/{number:012d}.jpg" for number in (9, 25)]


def test_roboflow(tmp_path):
    path = miniature.roboflow(tmp_path)
    archive = coco.read(path, ImageFolder(tmp_path))
    assert all(e.image.path.parent == tmp_path / "train" for e in archive.examples)
    assert archive.names[0] == "animals" and archive.drops.dropped == {"boxes: crowd": 1}


def test_lvis_for_training(tmp_path):
    train, _ = miniature.lvis(tmp_path)
    assert lvis.training_files(tmp_path) == [train] == lvis.training_files(train.parent)
    archive = lvis.read(train, ImageFolder(tmp_path))
    (example,) = archive.examples
    assert example.image.path == tmp_path / "train2017/000000391895.jpg"
    assert archive.names == ("mouse (computer equipment)", "hot dog")
    assert example.boxes[0].name == "mouse (computer equipment)"


def test_lvis_minival(tmp_path):
    _, val = miniature.lvis(tmp_path)
    to = tmp_path / "new" / "lvis_v1_minival.json"
    assert lvis.write_minival(val, to) == 2
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (val, to))
    assert [image["id"] for image in after["images"]] == [397133, 37777]
    assert after["images"][0] == before["images"][0]
    assert after["annotations"] == before["annotations"][:1]
    for field in ("categories", "info", "licenses"):
        assert after[field] == before[field]
    assert list(after) == list(before)
    data = to.read_bytes()
    lvis.write_minival(val, to)
    assert to.read_bytes() == data and [p.name for p in to.parent.iterdir()] == [to.name]
    truth = lvis_evaluation.load_lvis(to)
    assert len(truth.images) == 2 and len(truth.categories) == 2 and len(truth.boxes) == 1


def test_lvis_minival_of_something_else(tmp_path):
    train, _ = miniature.lvis(tmp_path)
    with pytest.raises(UserError, match='no image whose "coco_url" is in val2017'):
        lvis.write_minival(train, tmp_path / "to.json")
    (tmp_path / "broken.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="broken.json"):
        lvis.write_minival(tmp_path / "broken.json", tmp_path / "to.json")
    assert not (tmp_path / "to.json").exists()


def write_odinw(root):
    seed = 0
    for one in odinw.SETS:
        directory = root / one.directory
        for file in {one.annotation_file(s) for s in odinw.SPLITS} | {one.evaluation}:
            path = directory / file
            names = [f"{path.parent.name}_{number}_jpg.rf.0f.jpg" for number in range(2)]
            for name in names:
                seed += 1
                miniature.write_file(path.parent / name, miniature.jpeg(seed=seed))
            document = miniature.coco(names)
            spelt = {"CottontailRabbits": "Cottontail-Rabbit", "NorthAmericaMushrooms": "CoW"}
            document["categories"][0]["name"] = spelt.get(one.name, "Cat")
            miniature.write_json(path, document)


def test_odinw(tmp_path):
    write_odinw(tmp_path)
    assert len(odinw.SETS) == 13 == len({one.name for one in odinw.SETS})
    names = {"CottontailRabbits": "rabbit", "NorthAmericaMushrooms": "flat mushroom"}
    files = odinw.training_files(tmp_path)
    assert [odinw.set_of(path) for path in files] == list(odinw.SETS)
    for path, one in zip(files, odinw.SETS):
        archive = odinw.read(path, ImageFolder(tmp_path))
        assert [e.image.path.parent for e in archive.examples] == [path.parent] * 2
        assert archive.names[0] == names.get(one.name, "Cat")
    pistols = odinw.find("PISTOLS")
    assert pistols.annotation_file("valid") == "val_annotations_without_background.json"
    assert odinw.find("PascalVOC").annotation_file("test").startswith("valid/")
    with pytest.raises(
        UserError, match="Cars: not a set of ODinW. Use one of AerialMaritimeDrone, "
    ):
        odinw.find("Cars")
    assert odinw.set_of(tmp_path / "pothole.json") is None
    assert odinw.training_files(tmp_path / "pothole") == []


def test_odinw_for_evaluation(tmp_path):
    write_odinw(tmp_path / "odinw")
    files = odinw.write_evaluation(tmp_path / "odinw", tmp_path / "to")
    assert list(files) == [one.name for one in odinw.SETS]
    truth = coco_evaluation.load_coco(files["CottontailRabbits"])
    assert truth.categories[0].name == "rabbit"
    assert all(Path(image.file_name).is_file() for image in truth.images)
    truth = coco_evaluation.load_coco(files["EgoHands"])
    assert Path(truth.images[0].file_name).parent.name == "mini_val"
    miniature.write_json(tmp_path / "odinw/pothole/valid" / odinw._FILE, {"images": 3})
    with pytest.raises(UserError, match=r"pothole/valid/.*\. Unpack"):
        odinw.write_evaluation(tmp_path / "odinw", tmp_path / "to")


# img2dataset


def image_text(folder):
    archive = img2dataset.read(folder)
    return archive, list(archive.examples)


@pytest.mark.parametrize("form", ["tar", "tar alone", "folder", "parquet"])
def test_img2dataset(tmp_path, form):
    for shard in range(2):
        entries = miniature.shard_entries(5, shard)
        if form == "folder":
            miniature.shard_folder(tmp_path, entries, shard)
        elif form == "parquet":
            miniature.write_parquet(tmp_path / f"{shard:05d}.parquet", entries, images=True)
        else:
            miniature.webdataset(tmp_path, entries, shard, parquet=form == "tar")
    archive, examples = image_text(tmp_path)
    keys = [f"{shard:05d}/{shard:05d}{number:04d}" for shard in range(2) for number in (0, 3, 4)]
    assert [example.image_id for example in examples] == keys
    assert examples[1].caption == "a small dog number 3 on the grass"
    assert examples[4].image.read() == miniature.jpeg(seed=103)
    dead = {"images: failed to download": 2, "images: failed to resize": 2}
    assert archive.drops.dropped == ({} if form == "tar alone" else dead)
    assert archive.total == (6 if form == "tar alone" else 10)
    if form != "tar alone":
        explained = archive.drops.explained["images: failed to download"][0]
        assert "HTTP Error 404" in explained and "00000/000000001" in explained


def test_img2dataset_folders_of_two_sets(tmp_path):
    """CC3M and CC12M in one folder: they have the same keys and share some images."""
    for name, seed in (("cc12m", 1), ("cc3m", 0)):
        entries = miniature.shard_entries(4, 0)
        for entry in entries[1:]:
            entry.update(jpg=miniature.jpeg(seed=50 + seed), sha256=f"{seed}", status="success")
        miniature.webdataset(tmp_path / name, entries)
    archive, examples = image_text(tmp_path)
    assert [e.image_id for e in examples] == [
        "cc12m/00000/000000000",
        "cc12m/00000/000000001",
        "cc3m/00000/000000001",
    ]
    assert archive.drops.dropped == {"images: duplicate": 5}


def test_duplicates_without_a_noted_hash(tmp_path):
    entries = miniature.shard_entries(1)
    for number in range(1, 4):
        entries.append({**entries[0], "key": f"00000000{number}", "caption": f"other {number}"})
    entries[3]["jpg"] = miniature.jpeg(seed=9)
    for entry in entries:
        entry.pop("sha256")
    miniature.webdataset(tmp_path, entries)
    archive, examples = image_text(tmp_path)
    assert [e.image_id[-1] for e in examples] == ["0", "3"]
    assert archive.drops.dropped == {"images: duplicate": 2}


def test_good_dead_and_broken_entries_in_one_tar(tmp_path):
    entries = miniature.shard_entries(9)
    for number, caption in ((4, ""), (5, None), (6, "x" * 20_000), (7, "\ufeff é 猫")):
        entries[number]["caption"] = caption
    entries[8]["status"] = {"no": "text"}
    path = miniature.webdataset(tmp_path, entries, parquet=False)
    with miniature.tarfile.open(path, "a") as tar:
        for name, data in (
            ("000000090.txt", b"no image"),
            ("000000091.jpg", miniature.jpeg(seed=91)),  # no caption
            ("000000092.jpg", miniature.jpeg(seed=92)),
            ("000000092.txt", b"\xff no text"),
            ("000000093.jpg", miniature.jpeg(seed=93)),
            ("000000093.txt", b"a cat"),
            ("000000093.json", b"{not json"),
            ("000000093.jpg", miniature.jpeg(seed=94)),  # again
            ("000000093.npy", b"what is this"),
            ("\udcff.jpg", miniature.jpeg(seed=96)),  # a byte that is not valid text
            ("\udcff.txt", b"a byte"),
            ("folder/000000094.JPEG", miniature.jpeg(seed=95)),
            ("folder/000000094.txt", b"a bus"),
        ):
            member = miniature.tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, miniature.io.BytesIO(data))
    archive, examples = image_text(tmp_path)
    ids = [e.image_id.partition("/")[2] for e in examples]
    assert ids == [
        "000000000",
        "000000003",
        "000000007",
        "000000093",
        "\\udcff",
        "folder/000000094",
    ]
    assert archive.drops.dropped == {
        "captions: empty": 5,
        "images: failed": 1,
        "images: missing": 1,
        "images: key given twice": 1,
    }
    assert archive.drops.changed == {"images: metadata not read": 1}


@pytest.mark.parametrize("parquet", [False, True])
def test_a_tar_that_is_cut_off(tmp_path, parquet):
    entries = [entry for entry in miniature.shard_entries(12) if entry["status"] == "success"]
    path = miniature.webdataset(tmp_path, entries, parquet=parquet)
    whole = path.read_bytes()
    with miniature.tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset  # of the last member: two blocks of zeros follow, and more
    lost = set()
    for length in range(0, end + 512, 700):
        path.write_bytes(whole[:length])
        archive, examples = image_text(tmp_path)
        drops = archive.drops.dropped
        assert drops["shards: damaged"] == 1
        for example, entry in zip(examples, entries):
            assert example.image.read() == entry["jpg"] and example.caption == entry["caption"]
        if parquet:  # its rows show what is lost
            assert len(examples) + drops["images: missing"] + drops["captions: empty"] == 10
        lost.add(10 - len(examples))
    assert lost == set(range(11))
    path.write_bytes(whole)
    assert not image_text(tmp_path)[0].drops.dropped


def test_damaged_shards_are_counted(tmp_path):
    with pytest.raises(UserError, match="no shard"):
        img2dataset.read(tmp_path)
    good = miniature.webdataset(tmp_path, miniature.shard_entries(1), shard=5)
    for name, data in (
        ("00000.tar", b""),
        ("00001.tar", b"no tar" * 900),
        ("00002.parquet", b"PAR1"),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "00003").mkdir()
    miniature.write_parquet(tmp_path / "00004.parquet", miniature.shard_entries(2))  # no images
    archive, examples = image_text(tmp_path)
    assert [example.image.path for example in examples] == [good]
    assert archive.drops.dropped == {"shards: damaged": 4}
    explained = archive.drops.explained["shards: damaged"]
    assert (
        "00000.tar" in explained[0]
        and "00001.tar" in explained[1]
        and "00002.parquet" in explained[2]
    )


def test_seen():
    keys = np.random.default_rng(0).integers(0, 1 << 64, 3000, dtype=np.uint64, endpoint=False)
    keys[1000:1500] = keys[:500]
    keys[2999] = (1 << 64) - 1
    seen, before = img2dataset.SeenHashes(), set()
    seen._BATCH = 256
    for key in keys.tolist():
        assert seen.add(key) == (key not in before)
        before.add(key)
    assert len(seen._sorted) >= 2000


# prepared


def open_all(root):
    """Each miniature, as its command opens it."""
    miniature.objects365_v2(root / "o365")
    flickr, mixed = miniature.goldg(root / "goldg")
    train, _ = miniature.lvis(root / "lvis")
    write_odinw(root / "odinw")
    for shard in range(2):
        miniature.webdataset(root / "cc3m", miniature.shard_entries(5, shard), shard)
    miniature.write_parquet(root / "cc12m/00000.parquet", miniature.shard_entries(5), images=True)
    grounding = ImageFolder(root / "goldg")
    return {
        "objects365": [
            objects365.read(path, ImageFolder(root / "o365"))
            for path in objects365.training_files(root / "o365")
        ],
        "goldg": [goldg.read_without_coco(path, grounding) for path in (flickr, mixed)],
        "lvis": [lvis.read(train, ImageFolder(root / "lvis"))],
        "coco": [coco.read(miniature.coco2017(root / "coco"), ImageFolder(root / "coco"))],
        "custom": [coco.read(miniature.roboflow(root / "my"), ImageFolder(root / "my"))],
        "odinw": [odinw.read(odinw.training_files(root / "odinw")[2], ImageFolder(root))],
        "cc3m": [img2dataset.read(root / "cc3m")],
        "cc12m": [img2dataset.read(root / "cc12m")],
    }


def test_prepared(tmp_path):
    records = {
        "objects365": 3, "goldg": 4, "lvis": 1, "coco": 2, "custom": 2, "odinw": 2, "cc3m": 6,
        "cc12m": 3,
    }  # fmt: skip
    for name, archives in open_all(tmp_path / "from").items():
        source = prepare(
            archives, tmp_path / "to" / name, name=name, options=PrepareOptions(jobs=1)
        )
        assert len(source) == records[name], name
        assert not {"images: unreadable", "images: another size"} & source.info["dropped"].keys()
