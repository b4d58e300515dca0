import collections
import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import symbols, symbols_captions, symbols_scenes

TINY = symbols.SymbolsOptions(
    detection_scenes=60, grounding_scenes=40, image_text_scenes=60, val_scenes=60
)
DEFAULT = symbols.SymbolsOptions()
CROWDED_CAPTIONS = symbols.SymbolsOptions(caption_canvas=128, caption_objects=(1, 3))
ALL = symbols_scenes.load_symbols()
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    to = tmp_path_factory.mktemp("symbols") / "world"
    symbols.generate(to, seed=3, processes=1, options=TINY)
    return to


def load(world, name):
    return json.loads((world / "annotations" / name).read_text())


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def names_in(text):
    """(start, symbol, color, count) of every symbol a text names, found without the generator."""
    forms = {}
    for i, symbol in enumerate(ALL):
        forms[symbol.name] = (i, False)
        forms.setdefault(symbol.plural, (i, True))
    name = "|".join(sorted(map(re.escape, forms), key=len, reverse=True))
    color, number = "|".join(symbols_scenes.COLORS), "|".join(NUMBERS)
    pattern = rf"\b(?:({number}) )?(?:({color}) )?({name})\b"
    found = []
    for match in re.finditer(pattern, text.lower()):
        count = NUMBERS.get(match[1], 1)
        index, is_plural = forms[match[3]]
        same = ALL[index].name == ALL[index].plural
        assert same or is_plural == (count > 1), f"number of {match[0]!r} in {text!r}"
        found.append((match.start(), index, match[2], count))
    return found


# The symbols ------------------------------------------------------------------------------------


def test_there_are_enough_symbols_with_clean_unique_names():
    assert len(ALL) >= 200
    names = [symbol.name for symbol in ALL]
    assert len(set(names)) == len({symbol.codepoint for symbol in ALL}) == len(ALL)
    for name in names:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)?( [a-z]+){0,2}", name), name
        assert not set(name.split()) & {*symbols_scenes.COLORS, "left", "right of", "and"}, name
    assert len({symbol.plural for symbol in ALL} | set(names)) >= 2 * len(ALL) - 5
    assert {s.plural for s in ALL if s.name in ("cross mark", "mouse", "sickle", "infinity")} == {
        "cross marks",
        "mice",
        "sickles",
        "infinities",
    }


def test_no_two_symbols_look_alike_even_when_rotated():
    def picture(symbol, angle):
        mask = symbols_scenes.draw_symbol(symbol.character, 26, angle)
        frame = Image.new("L", (40, 40))
        frame.paste(mask, ((40 - mask.width) // 2, (40 - mask.height) // 2))
        blurred = frame.filter(ImageFilter.GaussianBlur(0.7))
        return np.asarray(blurred, np.float32).ravel() / 255

    upright = np.stack([picture(symbol, 0) for symbol in ALL])
    for angle in (-50, -25, 0, 25, 50):
        turned = np.stack([picture(symbol, angle) for symbol in ALL])
        dots = turned @ upright.T
        areas = (turned**2).sum(1)[:, None] + (upright**2).sum(1)[None]
        alike = dots / (areas - dots)  # the Tanimoto coefficient, a soft IoU
        np.fill_diagonal(alike, 0)
        worst = np.unravel_index(alike.argmax(), alike.shape)
        assert alike.max() < 0.93, [ALL[i].name for i in worst]


def test_novel_symbols_are_fixed_and_spread_over_the_families():
    base, novel = symbols.symbol_groups(DEFAULT)
    assert len(novel) >= 40 and sorted(base + novel) == list(range(len(ALL)))
    # Published numbers depend on the split, so it does not move unnoticed.
    assert [ALL[i].name for i in novel[:6]] == [
        "sun",
        "hot spring",
        "house",
        "pencil",
        "nib",
        "anchor",
    ]
    sizes = collections.Counter(symbol.family for symbol in ALL)
    chosen = collections.Counter(ALL[i].family for i in novel)
    for family, size in sizes.items():
        expected = size * len(novel) / len(ALL)
        assert abs(chosen[family] - expected) <= 1, family
    other = symbols.SymbolsOptions(split_seed=5)
    assert symbols.symbol_groups(other)[1] != novel


def test_training_boxes_have_a_long_tail():
    chances = symbols.symbol_chances("detection", DEFAULT)
    base, novel = symbols.symbol_groups(DEFAULT)
    assert chances.sum() == pytest.approx(1) and not chances[novel].any()
    boxes = chances[base] * 9000 * 3.5
    assert np.sum(boxes <= 10) == 8 and np.sum((boxes > 10) & (boxes <= 100)) == 25
    assert boxes.max() < 2 * boxes.mean()
    np.testing.assert_array_equal(chances, symbols.symbol_chances("grounding", DEFAULT))


def test_captions_speak_of_novel_symbols_evenly():
    chances = symbols.symbol_chances("image_text", DEFAULT)
    _, novel = symbols.symbol_groups(DEFAULT)
    assert chances[novel].sum() == pytest.approx(DEFAULT.novel_share)
    assert np.ptp(chances[novel]) < 1e-12


# Pictures ---------------------------------------------------------------------------------------


def background_again(seed, split, index, options, scene):
    """The image without its symbols: the first draws of the generator, repeated."""
    rng = symbols.scene_generator(seed, split, index)
    if split != "image_text" and rng.integers(3):
        rng.uniform()
    kind = symbols_scenes.BACKGROUNDS[rng.integers(len(symbols_scenes.BACKGROUNDS))]
    assert kind == scene.background
    return symbols_scenes.draw_background(rng, kind, scene.height, scene.width, options.difficulty)


def changed_pixels(seed, split, index, options):
    example, image = symbols.make_scene(seed, split, index, options)
    empty, tones = background_again(seed, split, index, options, example.scene)
    changed = np.any(np.asarray(image) != np.asarray(empty), axis=-1)
    return example.scene, np.asarray(image), changed, tones


@pytest.mark.parametrize("split", ["detection", "image_text", "val"])
def test_boxes_are_tight_and_inside(split):
    for index in range(40):
        scene, _, changed, _ = changed_pixels(1, split, index, DEFAULT)
        assert scene.objects
        covered = np.zeros_like(changed)
        for thing in scene.objects:
            x0, y0, x1, y1 = map(int, thing.box)
            assert (x0, y0, x1, y1) == thing.box
            assert 0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height
            inside = changed[y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            covered[y0:y1, x0:x1] = True
        assert not (changed & ~covered).any()


def test_symbols_have_the_color_they_are_said_to_have_and_it_stands_out():
    seen = set()
    for index in range(120):
        scene, pixels, changed, tones = changed_pixels(2, "detection", index, DEFAULT)
        readable = symbols_scenes.readable_colors(tones)
        for thing in scene.objects:
            x0, y0, x1, y1 = map(int, thing.box)
            inside = pixels[y0:y1, x0:x1][changed[y0:y1, x0:x1]]
            # Hairlines of small symbols are blended with the ground: not all pixels have it pure.
            distance = np.linalg.norm(
                inside - np.float64(symbols_scenes.COLORS[thing.color]), axis=-1
            )
            assert np.mean(distance < 60) > 0.1, (index, ALL[thing.symbol].name)
            assert thing.color in readable
            seen.add(thing.color)
    assert seen == set(symbols_scenes.COLORS)


def test_black_on_dark_and_white_on_light_are_unreadable():
    dark, light = np.full((2, 3), 40.0), np.full((2, 3), 240.0)
    assert "black" not in symbols_scenes.readable_colors(dark)
    assert "white" not in symbols_scenes.readable_colors(light)
    for tone in symbols_scenes.TONES:
        assert len(symbols_scenes.readable_colors(np.array([tone]))) >= 4
    # Against the whole palette no color stands out: the best one is still given.
    palette = np.array(list(symbols_scenes.COLORS.values()), float)
    assert len(symbols_scenes.readable_colors(palette)) == 1


def test_overlap_sizes_and_counts_keep_their_limits():
    sizes = []
    for index in range(150):
        scene = symbols.make_scene(4, "detection", index, DEFAULT)[0].scene
        assert max(scene.height, scene.width) == 128 and min(scene.height, scene.width) >= 102
        assert 1 <= len(scene.objects) <= 6
        boxes = np.array([thing.box for thing in scene.objects])
        sides = boxes[:, 2:] - boxes[:, :2]
        sizes += list(sides.max(1))
        for i in range(len(boxes)):
            for j in range(i):
                shared = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(
                    boxes[i, :2], boxes[j, :2]
                )
                limit = DEFAULT.overlap * min(sides[i].prod(), sides[j].prod())
                assert shared.clip(0).prod() <= limit
    # Rotation by 25 degrees makes a square's box 1.33 times as wide.
    assert min(sizes) >= 24 * 0.9 - 2 and max(sizes) <= 64 * 1.34 + 2


def test_hard_options_still_make_scenes():
    crowded = symbols.SymbolsOptions(objects=(9, 9), rotation=180.0, difficulty=1.0, overlap=0.0)
    example, _ = symbols.make_scene(0, "grounding", 0, crowded)
    assert 2 <= len(example.scene.objects) <= 9
    lonely = symbols.SymbolsOptions(novel=len(ALL) - 1, objects=(3, 3))
    example, _ = symbols.make_scene(0, "grounding", 0, lonely)
    assert len({thing.symbol for thing in example.scene.objects}) == 1
    no_novel = symbols.SymbolsOptions(novel=0)
    assert symbols.symbol_chances("image_text", no_novel).sum() == pytest.approx(1)


# Sentences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["grounding", "image_text"])
def test_captions_say_exactly_what_is_there(split):
    relations = collections.Counter()
    for index in range(300):
        example = symbols.make_scene(5, split, index, CROWDED_CAPTIONS)[0]
        scene = example.scene
        for caption in example.captions:
            found = names_in(caption.text)
            assert len(found) == len(caption.mentions)
            named = collections.Counter()
            by_start = {}
            for start, symbol, color, count in found:
                owners = [
                    i
                    for i, thing in enumerate(scene.objects)
                    if thing.symbol == symbol and color in (None, thing.color)
                ]
                assert len(owners) == count, (caption.text, ALL[symbol].name)
                named.update(owners)
                by_start[start] = owners
            assert named == collections.Counter(range(len(scene.objects))), caption.text
            for mention, (start, end) in zip(caption.mentions, caption.spans):
                inside = [at for at in by_start if start <= at < end]
                assert len(inside) == 1 and by_start[inside[0]] == list(mention.members)
                assert caption.text[start:end].strip() == caption.text[start:end]
            if match := re.search(r"background|ground", caption.text):
                assert f"on a {scene.background} {match[0]}" in caption.text
            for word in ("left of", "right of", "above", "below"):
                if f" {word} " in caption.text:
                    at = caption.text.index(f" {word} ")
                    first = by_start[max(start for start in by_start if start < at)]
                    second = by_start[min(start for start in by_start if start > at)]
                    check_relation(word, first, second, scene.objects)
                    relations[word] += 1
    assert len(relations) == 4


def check_relation(word, first, second, objects):
    for i in first:
        for j in second:
            a, b = objects[i].box, objects[j].box
            center = [(box[0] + box[2], box[1] + box[3]) for box in (a, b)]
            axis, sign = {
                "left of": (0, 1),
                "right of": (0, -1),
                "above": (1, 1),
                "below": (1, -1),
            }[word]
            assert sign * (center[1][axis] - center[0][axis]) > 0


def test_phrases_read_as_english():
    at = {symbol.name: i for i, symbol in enumerate(ALL)}

    def say(name, color, count, article):
        mention = symbols_captions.Mention(at[name], color, tuple(range(count)))
        return symbols_captions.phrase(mention, article)

    assert say("anchor", None, 1, "a") == "an anchor"
    assert say("anchor", "red", 1, "a") == "a red anchor"
    assert say("telephone", "orange", 1, "a") == "an orange telephone"
    assert say("union", None, 1, "a") == "a union"
    assert say("euro sign", None, 1, "the") == "the euro sign"
    assert say("umbrella", "blue", 2, "the") == "two blue umbrellas"
    assert say("scissors", "red", 1, "a") == "red scissors"
    assert say("mouse", None, 12, "a") == "12 mice"
    assert say("cat", None, 1, "") == "cat"


# Files ------------------------------------------------------------------------------------------


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    few = symbols.SymbolsOptions(
        detection_scenes=55, grounding_scenes=3, image_text_scenes=4, val_scenes=2
    )
    for processes in (1, 2):
        symbols.generate(tmp_path / str(processes), seed=7, processes=processes, options=few)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    symbols.generate(tmp_path / "other", seed=8, processes=1, options=few)
    first, other = digests(tmp_path / "1"), digests(tmp_path / "other")
    assert not set(first.values()) & set(other.values())


def test_every_scene_has_random_numbers_of_its_own(world):
    draws = {
        (split, index): symbols.scene_generator(0, split, index).integers(2**62)
        for split in symbols.SPLITS
        for index in range(2000)
    }
    assert len(set(draws.values())) == len(draws)
    contents = list(digests(world / "images").values())
    assert len(set(contents)) == len(contents)


def check_images(world, kind, images):
    for entry in images:
        with Image.open(world / "images" / kind / entry["file_name"]) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert (image.height, image.width) == (entry["height"], entry["width"])
            assert all(component[1:3] == (1, 1) for component in image.layer)  # no subsampling


def test_detection_is_coco_with_base_symbols_only(world):
    from pycocotools.coco import COCO

    coco = COCO(str(world / "annotations" / "detection_train.json"))
    check_images(world, "detection", coco.dataset["images"])
    assert len(coco.getImgIds()) == TINY.detection_scenes
    assert len({(entry["height"], entry["width"]) for entry in coco.dataset["images"]}) > 5
    base, novel = symbols.symbol_groups(TINY)
    assert sorted(coco.getCatIds()) == [i + 1 for i in base]
    names = {category["name"] for category in coco.dataset["categories"]}
    assert not names & {ALL[i].name for i in novel}
    for annotation in coco.dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        image = coco.imgs[annotation["image_id"]]
        assert annotation["category_id"] in coco.cats and annotation["iscrowd"] == 0
        assert w > 0 and h > 0 and x >= 0 and y >= 0
        assert x + w <= image["width"] and y + h <= image["height"]
        assert annotation["area"] == w * h
        assert annotation["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]


def test_grounding_is_mdetr_and_never_shows_a_novel_symbol(world):
    content = load(world, "grounding_train.json")
    check_images(world, "grounding", content["images"])
    files = {entry["file_name"] for entry in content["images"]}
    assert len(files) == TINY.grounding_scenes < len(content["images"])
    novel = set(symbols.symbol_groups(TINY)[1])
    owned = collections.Counter()
    images = {entry["id"]: entry for entry in content["images"]}
    assert len(images) == len(content["images"])
    for annotation in content["annotations"]:
        ((start, end),) = annotation["tokens_positive"]
        words = images[annotation["image_id"]]["caption"][start:end]
        ((_, symbol, _, count),) = names_in(words)
        assert symbol not in novel
        owned[annotation["image_id"], start, count] += 1
    assert all(boxes == count for (_, _, count), boxes in owned.items())
    assert any(count > 1 for _, _, count in owned)


def test_image_text_lines_have_captions_only(world):
    lines = (world / "annotations" / "image_text_train.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == TINY.image_text_scenes
    novel = set(symbols.symbol_groups(TINY)[1])
    named = []
    for entry in entries:
        assert set(entry) == {"file_name", "captions"}
        (text,) = entry["captions"]
        named += [symbol for _, symbol, _, _ in names_in(text)]
        with Image.open(world / "images" / "image_text" / entry["file_name"]) as image:
            assert image.size == (64, 64)
    assert 0.15 < np.mean([symbol in novel for symbol in named]) < 0.6


def test_validation_is_lvis_and_federated(world):
    content = load(world, "lvis_val.json")
    check_images(world, "val", content["images"])
    assert set(content) >= {"info", "images", "annotations", "categories"}
    categories = content["categories"]
    assert [category["id"] for category in categories] == list(range(1, len(ALL) + 1))
    needed = {"name", "synonyms", "synset", "def", "frequency", "image_count", "instance_count"}
    assert all(needed <= set(category) for category in categories)
    groups = collections.Counter(category["group"] for category in categories)
    assert groups == {"base": len(ALL) - 45, "novel": 45}
    present = collections.defaultdict(set)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert annotation["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]
        assert annotation["area"] == w * h
        present[annotation["image_id"]].add(annotation["category_id"])
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(
        content["annotations"]
    )
    loose = 0
    for image in content["images"]:
        negatives = image["neg_category_ids"]
        assert len(set(negatives)) == TINY.negatives
        assert not set(negatives) & present[image["id"]]
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]
        loose += len(image["not_exhaustive_category_ids"])
        # Validation cycles through all symbols in order.
        assert image["id"] in present[image["id"]]
    assert 0 < loose < len(content["images"])
    assert {i + 1 for i in symbols.symbol_groups(TINY)[1]} & set.union(*present.values())


def test_frequency_counts_the_training_boxes(world):
    detection, grounding = load(world, "detection_train.json"), load(world, "grounding_train.json")
    images, instances = collections.Counter(), collections.Counter()
    for annotation in detection["annotations"]:
        instances[annotation["category_id"]] += 1
    images.update({(a["image_id"], a["category_id"]): 0 for a in detection["annotations"]}.keys())
    images = collections.Counter(category for _, category in images)
    first_captions = {}
    for entry in grounding["images"]:
        first_captions.setdefault(entry["file_name"], entry["caption"])
    for text in first_captions.values():
        in_image = collections.Counter()
        for _, symbol, _, count in names_in(text):
            in_image[symbol + 1] += count
        instances.update(in_image)
        images.update(in_image.keys())
    for category in load(world, "lvis_val.json")["categories"]:
        assert category["image_count"] == images[category["id"]]
        assert category["instance_count"] == instances[category["id"]]
        bound = category["image_count"]
        assert category["frequency"] == ("r" if bound <= 10 else "c" if bound <= 100 else "f")
    shown = load(world, "symbols.json")["symbols"]
    assert [entry["name"] for entry in shown] == [symbol.name for symbol in ALL]
    assert all(entry["codepoint"] == f"U+{ord(entry['character']):04X}" for entry in shown)


def test_a_second_call_leaves_the_same_and_refuses_another(world, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    symbols.generate(world, seed=3, options=TINY)
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(UserError, match="Remove it or choose"):
        symbols.generate(world, seed=4, options=TINY)
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="Remove it or choose"):
        symbols.generate(tmp_path, options=TINY)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_an_interrupted_generation_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    few = symbols.SymbolsOptions(
        detection_scenes=2, grounding_scenes=1, image_text_scenes=1, val_scenes=0
    )

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(symbols, "_write_annotations", fail)
        with pytest.raises(KeyboardInterrupt):
            symbols.generate(tmp_path / "world", processes=1, options=few)
    assert not (tmp_path / "world").exists()
    symbols.generate(tmp_path / "world", processes=1, options=few)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert load(tmp_path / "world", "lvis_val.json")["images"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"novel": 10_000},
        {"objects": (0, 3)},
        {"caption_objects": (3, 2)},
        {"symbol_size": (60.0, 70.0)},
        {"overlap": 1.5},
        {"val_scenes": -1},
        {"jpeg_quality": 0},
    ],
)
def test_invalid_options_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        symbols.SymbolsOptions(**wrong)
