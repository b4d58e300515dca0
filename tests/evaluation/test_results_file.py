import json

import numpy as np
import pytest
from test_evaluate import make_set

from detclipv2_jax import evaluate
from detclipv2_jax.common import json_file
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, datasets, lvis, measure, report, results_file

GOOD = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5}


def found(truth, seed=0):
    """Yield (image id, xyxy boxes, scores, category ids), with all digits of float32."""
    rng = np.random.default_rng(seed)
    for image in truth.images:
        boxes = truth.boxes[truth.boxes_of_image[image.id]].repeat(3, axis=0)
        boxes = (boxes + rng.normal(0, 1, boxes.shape)).astype(np.float32)
        yield image.id, boxes, rng.random(len(boxes), np.float32), rng.integers(0, 4, len(boxes))


def save(tmp_path, entries):
    path = tmp_path / "found.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


@pytest.mark.parametrize("federated", [True, False])
def test_what_is_written_reads_back_to_the_same_metrics(tmp_path, federated):
    truth = datasets.load_ground_truth(make_set(tmp_path, federated=federated))
    evaluator = (lvis.LvisEvaluator if federated else coco.CocoEvaluator)(truth)
    path = tmp_path / "new" / "found.json"
    with results_file.results_writer(path) as write:
        for answer in found(truth):
            evaluator.add(*answer)
            write(*answer)
        assert not path.exists()  # it appears complete or not at all
    entries = json.loads(path.read_text())
    assert len(entries) == 36 and set(entries[0]) == set(GOOD)
    measured = measure.measure_results_file(path, truth, output=tmp_path / "out")
    wanted = evaluator.result()
    if federated:
        assert measured["standard"] == wanted.standard and measured["fixed"] == wanted.fixed
        assert measured["groups"] == wanted.groups
        rows = json.loads((tmp_path / "out" / "categories.json").read_text())
        assert rows == wanted.categories
    else:
        assert measured["coco"] == wanted
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == measured
    assert measured["settings"]["entries"] == 36
    assert str(path) in report.results_table(measured)


def test_an_interrupted_writer_leaves_no_file(tmp_path):
    path = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt), results_file.results_writer(path) as write:
        write(0, np.ones((1, 4)), np.ones(1), np.ones(1, int))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with results_file.results_writer(path) as write:
        write(0, np.ones((0, 4)), np.ones(0), np.ones(0, int))
    assert json.loads(path.read_text()) == []


def test_order_of_entries_and_sizes_of_chunks_do_not_matter(tmp_path, monkeypatch):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    path = tmp_path / "found.json"
    with results_file.results_writer(path) as write:
        for answer in found(truth):
            write(*answer)
    whole = measure.measure_results_file(path, truth)
    monkeypatch.setattr(results_file, "_ENTRIES_PER_CHECK", 5)
    monkeypatch.setattr(results_file, "_ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(json_file, "_CHUNK", 64)
    assert measure.measure_results_file(path, truth) == whole
    entries = json.loads(path.read_text())
    order = np.random.default_rng(1).permutation(len(entries))
    path.write_text(json.dumps([entries[n] | {"area": 3, "segmentation": []} for n in order]))
    assert measure.measure_results_file(path, truth) == whole


def test_strange_entries_are_counted_with_a_warning(tmp_path, capsys):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    strange = [{"image_id": 99}, {"category_id": 99}, {"image_id": -1, "category_id": 99}]
    strange += [{"bbox": [5, 5, -2, 3]}, {"bbox": [5, 5, 0, 3]}]
    path = save(tmp_path, [GOOD, *(GOOD | change for change in strange)])
    settings = measure.measure_results_file(path, truth)["settings"]
    counts = {"unknown_images": 2, "unknown_categories": 1, "negative_sizes": 1}
    assert settings.items() >= {"entries": 6, "images": 6, **counts}.items()
    warnings = capsys.readouterr().err
    assert (
        "2 of 6 entries have an image_id that is not" in warnings
        and "category_id" in warnings
        and "negative" in warnings
    )
    with pytest.raises(UserError, match="none of the 2 entries"):
        measure.measure_results_file(save(tmp_path, [GOOD | strange[0]] * 2), truth)
    assert measure.measure_results_file(save(tmp_path, []), truth)["fixed"]["AP"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": "high"}, r"score is \"high\", not a finite number"),
        ({"score": None}, r"score is null, not a finite number"),
        ({"score": float("nan")}, r"score is NaN, not a finite number"),
        ({"score": "nan"}, r"score is \"nan\", not a finite number"),
        ({"score": True}, r"score is true"),
        ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("inf")]}, r"bbox is \[1, 2, 3, Infinity\]"),
        ({"bbox": [1, 2, 3, "4 px"]}, r"bbox is \[1, 2, 3, \"4 px\"\]"),
        ({"bbox": [1, 2, 3, 10**400]}, r"bbox is"),
        ({"bbox": {"x": 1}}, r"bbox is {\"x\": 1}, not four"),
        ({"image_id": 1.5}, r"image_id is 1.5, not a whole number or a text"),
        ({"image_id": float("nan")}, r"image_id is NaN"),
        ({"category_id": [1]}, r"category_id is \[1\]"),
    ],
)
def test_broken_entries_are_named(tmp_path, monkeypatch, change, message):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    path = save(tmp_path, [GOOD, GOOD, GOOD | change, GOOD])
    for batch in (1, 3, 100):
        monkeypatch.setattr(results_file, "_ENTRIES_PER_CHECK", batch)
        with pytest.raises(UserError, match=rf"found\.json: \[2\]\.{message}"):
            results_file.read_results(path, truth)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", 'no list "images". Give a results file'),
        ("3", "holds a JSON number, not a list"),
        ("", "empty"),
        ('[{"image_id": 0,', "not valid JSON"),
        ("[1, 2]", r"\[0\]: 1 is not an object"),
        (json.dumps([GOOD]) + " x", "Extra data"),
        ("\x00\x01", "JSON"),
    ],
)
def test_a_file_without_results_is_a_user_error(tmp_path, capsys, text, message):
    dataset, path = make_set(tmp_path), save(tmp_path, text)
    with pytest.raises(UserError, match=rf"found\.json.*{message}"):
        results_file.read_results(path, datasets.load_ground_truth(dataset))
    command = [f"--predictions={path}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]
    assert evaluate.main(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no such file"):
        results_file.read_results(tmp_path / "missing.json", datasets.load_ground_truth(dataset))


def test_the_command_measures_a_results_file(tmp_path, capsys):
    dataset = make_set(tmp_path, federated=False)
    truth = datasets.load_ground_truth(dataset)
    entries = [
        {"image_id": int(i), "category_id": int(c), "bbox": box, "score": 1}
        for i, c, box in zip(truth.image_ids, truth.category_ids, truth.xywh.tolist())
    ]
    path = save(tmp_path, entries)
    command = [f"--predictions={path}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]
    assert evaluate.main(command) == 0
    assert "1.000" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["coco"]["AP"] == 1
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--checkpoint=there"])
