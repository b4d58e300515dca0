import json

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common import plots
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import PhraseRegions


def differs(a, b):
    """Return a mask of the pixels in which two images differ."""
    return (np.asarray(a).astype(int) != np.asarray(b)).any(-1)


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_frames_are_visible_at_their_place_on_any_background(shade):
    image = np.full((640, 640, 3), shade, np.uint8)
    drawn = drawing.draw_boxes(image, np.array([[100, 200, 300, 500.0]]), ["cat"], [0.5])
    changed = differs(drawn, image)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert abs(columns[0] - 100) <= 2 and abs(columns[-1] - 300) <= 2 and abs(rows[-1] - 500) <= 2
    assert 160 < rows[0] <= 200  # the label is above the box
    assert not changed[215:485, 115:285].any()  # the inside is not drawn on
    wanted = np.array(drawing.name_color("cat"))
    assert (np.asarray(drawn)[350, 100:106] == wanted).all(-1).any()


def test_small_images_are_enlarged_and_large_ones_are_not():
    small = drawing.draw_boxes(np.zeros((32, 64, 3), np.uint8), [], [])
    assert small.size == (640, 320)
    assert drawing.draw_boxes(np.zeros((700, 900, 3), np.uint8), [], []).size == (900, 700)


def test_colors_depend_on_names_and_differ():
    colors = {drawing.name_color(f"name {n}") for n in range(40)}
    assert len(colors) > 30 and drawing.name_color("cat") == drawing.name_color("cat")


def test_labels_are_inside_the_image_and_do_not_overlap(monkeypatch):
    placed = []
    place = drawing._label_place
    monkeypatch.setattr(drawing, "_label_place", lambda *a: placed.append(place(*a)) or placed[-1])
    boxes = [
        [0, 0, 60, 40],
        [2, 3, 62, 43],
        [600, 0, 640, 9],
        [300, 630, 640, 640],
        [320, 320, 320, 320],
    ]
    names = ["alarm clock", "umbrella", "black chess knight", "a very long name " * 9, "x"]
    drawing.draw_boxes(np.zeros((640, 640, 3), np.uint8), boxes, names, [0.9] * 5)
    for n, (x0, y0, x1, y1) in enumerate(placed):
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 640
        assert all(drawing._overlap(placed[n], other) == 0 for other in placed[:n])


def test_long_names_are_cut_before_their_score():
    font = drawing._font(14)
    text = drawing._shortened("a very long name " * 9, " 0.50", font, 120)
    assert text.endswith("… 0.50") and font.getlength(text) <= 120
    assert drawing._shortened("cat", " 0.50", font, 120) == "cat 0.50"


def test_boxes_outside_the_image_or_inverted_are_accepted():
    boxes = [[-50, -50, -10, -10], [700, 700, 900, 900], [300, 300, 100, 100], [0, 0, 640, 640]]
    drawing.draw_boxes(np.zeros((640, 640, 3), np.uint8), boxes, list("abcd"))


def regions(boxes, phrases):
    scores = np.full(len(phrases), 0.5, np.float32)
    return PhraseRegions(tuple(phrases), np.float32(boxes).reshape(-1, 4), scores, scores, (64, 64))


def test_a_caption_is_below_its_image_in_the_colors_of_its_boxes():
    gray = np.full((64, 64, 3), 128, np.uint8)
    boxes, phrases = [[5, 5, 30, 30], [30, 30, 60, 60]], ["red cat", "dog"]
    drawn = np.asarray(drawing.draw_caption(gray, "The red cat, a dog", regions(boxes, phrases)))
    assert drawn.shape[1] == 640 and 660 < drawn.shape[0] < 720
    where = [(drawn == color).all(-1) for color in drawing._PHRASE_COLORS[:3]]
    assert where[0][:640].any() and where[1][:640].any() and not where[2].any()
    first, second = (np.flatnonzero(x[640:].any(0)) for x in where[:2])
    assert len(first) and len(second) and first[-1] < second[0]
    assert (drawn[640:] == 0).all(-1).any()  # the other words are black
    none = drawing.draw_caption(gray, "word " * 100, regions([], []))
    assert none.width == 640 and none.height > drawn.shape[0] + 100


def test_colors_of_phrases_can_be_read_on_white_and_start_again():
    assert len(set(drawing._PHRASE_COLORS)) == len(drawing._PHRASE_COLORS) >= 7
    for color in drawing._PHRASE_COLORS:
        assert 1.05 / (drawing._luminance(color) + 0.05) >= 4.5  # WCAG 2, for text
    many = [f"thing {n}" for n in range(20)]
    boxes = [[n, n, 60, 60] for n in range(20)]
    drawing.draw_caption(np.zeros((64, 64, 3), np.uint8), " ".join(many), regions(boxes, many))


def test_equal_boxes_are_nested():
    boxes = [[10, 10, 50, 50], [0, 0, 5, 5], [10, 10, 50.5, 50], [10, 10, 50, 50], [0, 0, 5, 5]]
    found = drawing._nested(np.array(boxes), 2.0)
    wanted = [boxes[0], boxes[1], [12, 12, 48.5, 48], [14, 14, 46, 46], [2, 2, 3, 3]]
    np.testing.assert_allclose(found, wanted)
    tiny = drawing._nested(np.array([[0, 0, 1, 1.0]] * 3), 2.0)
    assert (tiny[:, 2:] >= tiny[:, :2]).all() and drawing._nested(np.zeros((0, 4)), 1).size == 0


def test_grid_contains_every_image():
    shades = [40, 80, 120, 160, 200]
    sizes = [(30, 20), (30, 20), (50, 60), (10, 10), (30, 20)]
    cells = [Image.new("RGB", size, (s, s, s)) for size, s in zip(sizes, shades)]
    sheet = np.asarray(drawing.grid(cells, [f"title {s}" for s in shades], columns=2))
    for (width, height), shade in zip(sizes, shades):
        block = (sheet == shade).all(-1)
        assert block.sum() >= width * height
    with pytest.raises(ValueError, match="at least one"):
        drawing.grid([], [], columns=2)


def write_log(path, steps=60):
    with open(path, "w") as file:
        for step in range(steps):
            kind = ("detection", "grounding", "image_text")[step % 3]
            row = {"step": step, "kind": kind, "loss": 3.0 / (step + 1), "align": 1.0, "lr": 1e-3}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": steps, "fixed/AP": 0.3}) + "\n")


def test_loss_curves_have_one_panel_per_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_log(path)
    curves = plots._losses(plots._rows(path))
    assert set(curves) == {"detection", "grounding", "image_text"}
    assert set(curves["detection"]) == {"loss", "align"} and len(curves["detection"]["loss"]) == 20
    plots.plot_losses(path, tmp_path / "pictures" / "losses.png")
    with Image.open(tmp_path / "pictures" / "losses.png") as picture:
        assert picture.width > 2.5 * picture.height
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["losses.png"]


def test_loss_curves_of_an_unfinished_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_log(path)
    whole = plots._losses(plots._rows(path))
    with open(path, "a") as file:
        file.write('{"step": 60, "kind": "detection", "loss": null}\n{"step": 61, "lo')
    assert plots._losses(plots._rows(path)) == whole
    path.write_text("")
    plots.plot_losses(path, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
    path.write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a JSON"):
        plots.plot_losses(path, tmp_path / "none.png")
    with pytest.raises(UserError, match="no such file"):
        plots.plot_losses(tmp_path / "absent.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_running_mean():
    values = np.random.default_rng(0).normal(size=130)
    wanted = [values[max(0, n - 2) : n + 3].mean() for n in range(130)]
    np.testing.assert_allclose(plots._running_mean(values), wanted, atol=1e-12)
    np.testing.assert_allclose(plots._running_mean(values[:9]), values[:9], atol=1e-12)


def test_png_is_written_with_its_directory(tmp_path):
    picture = Image.new("RGB", (4, 4))
    drawing.save_png(picture, tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").size == (4, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        drawing.save_png(picture, tmp_path / "file" / "a.png")


def test_labels_of_many_boxes_are_small_and_have_contrast(monkeypatch):
    sizes = []
    place = drawing._label_place
    monkeypatch.setattr(drawing, "_label_place", lambda *a: sizes.append(place(*a)) or sizes[-1])
    boxes = np.random.default_rng(0).uniform(0, 500, (100, 2)).repeat(2, 0).reshape(-1, 4)
    boxes[:, 2:] = boxes[:, :2] + 60
    drawing.draw_boxes(np.zeros((1200, 1200, 3), np.uint8), boxes, ["a very long name " * 4] * 100)
    assert max(y1 - y0 for _, y0, _, y1 in sizes) < 20
    assert max(x1 - x0 for x0, _, x1, _ in sizes) <= 0.4 * 1200
    for n in range(40):
        luminance = drawing._luminance(drawing.name_color(f"name {n}"))
        black, white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
        assert (black >= white) == (luminance > drawing._MIDDLE_LUMINANCE)
