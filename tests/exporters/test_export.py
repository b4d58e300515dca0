"""Every exported format, loaded in its own runtime without this package."""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from jax import export as jax_export
from PIL import Image

from detclipv2_jax import export as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.exporters import export, saved_model
from detclipv2_jax.exporters import onnx as onnx_format
from detclipv2_jax.exporters.served import served_model
from detclipv2_jax.inference.checkpoint import LoadedModel
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.threshold import FALLBACK
from detclipv2_jax.models import detclip, sizes
from detclipv2_jax.ops.nms import class_nms
from detclipv2_jax.text.tokenizer import tokenize

CANVAS = (64, 96)
NAMES = ["cat", "traffic light", "chess knight"]
DEFINITIONS = {
    "cat": "a small animal with whiskers",
    "traffic light": "a signal at a crossing, red, yellow and green, that tells who has to wait",
    "chess knight": "a horse's head on a board",
}


@pytest.fixture(scope="session")
def loaded():
    """`nano` with random parameters, large enough that offsets, boxes and scores vary widely."""
    graphdef, params = detclip.create(sizes.NANO, 0)
    rng = np.random.default_rng(0)
    noisy = lambda p: np.asarray(p) + rng.normal(scale=0.05, size=p.shape).astype(np.float32)
    params = jax.tree.map(noisy, params) | {"logit_bias": np.float32(0.0)}
    evaluation = {
        "canvas": CANVAS,
        "max_detections": 1000,
        "definitions": "as_trained",
    }
    config = {
        "model": sizes.NANO.to_dict(),
        "eval": evaluation,
        "data": {"detection": {"sources": ["objects365"]}, "grounding": {"sources": []}},
        "train": {"epochs": 2.0},
        "init": {"backbone": "/somewhere/swin.pth", "text": ""},
    }
    run = json.loads(json.dumps(config))  # as a checkpoint stores it
    detect = DetectConfig(**evaluation)
    return LoadedModel(graphdef, params, sizes.NANO, detect, 7, ["cat"], DEFINITIONS, run=run)


@pytest.fixture(scope="session")
def pictures():
    """A batch: an image that fills its canvas, a smaller one, an empty slot."""
    images = np.random.default_rng(1).integers(0, 256, (3, *CANVAS, 3), np.uint8)
    sizes_ = np.array([CANVAS, (40, 70), (0, 0)], np.int32)
    images[1, 40:] = images[1, :, 70:] = images[2] = 0
    return images, sizes_


@pytest.fixture(scope="session")
def wanted(loaded, pictures):
    """The detections of the model itself, in JAX."""
    served = served_model(loaded, NAMES, max_detections=20)
    return {k: np.asarray(v) for k, v in jax.jit(served.detect_function())(*pictures).items()}


@contextlib.contextmanager
def checkpoint(loaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detclipv2_jax.inference.checkpoint.load_model", lambda *_: loaded)
        yield


def write(loaded, output, format_name, *options):
    line = ["--checkpoint=run", f"--format={format_name}", f"--output={output}", *options]
    with checkpoint(loaded):
        return door.main(line)


RUNNER = """
import functools, runpy, sys
for name in ("detclipv2_jax", *sys.argv[4].split(",")):
    sys.modules[name] = None
import numpy as np
example = runpy.run_path(sys.argv[1] + "/example.py")["main"].__globals__
example["load"] = functools.cache(example["load"])  # loaded once per process, as in a server
given = np.load(sys.argv[2])
names = sys.argv[5:]
texts = [example["encode"](names)] if names else []
detector = example["load"]("detector")
found = {}
for count in (1, 3):
    answer = detector(given["images"][:count], given["sizes"][:count], *texts)
    found |= {f"{key}{count}": np.asarray(value) for key, value in answer.items()}
np.savez(sys.argv[3], **found)
example["main"](sys.argv[3].replace(".npz", ".png"), *names)
"""


def outputs_and_prints(folder, pictures, without, names, tmp_path):
    """Return a file's outputs for one image and for all of them, and what its example prints."""
    given, found = tmp_path / "given.npz", tmp_path / "found.npz"
    np.savez(given, images=pictures[0], sizes=pictures[1])
    Image.fromarray(pictures[0][0]).save(tmp_path / "found.png")
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    elsewhere = os.pathsep.join(path for path in paths if path and Path(path) != tiny_run.ROOT)
    process = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER, folder, given, found, without, *names],
        env=os.environ | {"PYTHONPATH": elsewhere},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    with np.load(found) as arrays:
        return dict(arrays), process.stdout


def assert_same(found, wanted, count):
    """Check that each wanted detection was found: name, score to 1e-4, box to 0.1 pixel.

    Not by rank, because scores that differ by rounding may be in another order. Returns the largest
    differences of a score and of a side.
    """
    worst = np.zeros(2)
    for n in range(count):
        here, there = wanted["mask"][n], found[f"mask{count}"][n]
        assert there.sum() == here.sum() and not found[f"boxes{count}"][n][~there].any()
        left = there.copy()
        for slot in np.flatnonzero(here):
            scores = np.abs(found[f"scores{count}"][n] - wanted["scores"][n, slot])
            boxes = np.abs(found[f"boxes{count}"][n] - wanted["boxes"][n, slot]).max(axis=-1)
            same = left & (found[f"labels{count}"][n] == wanted["labels"][n, slot])
            errors = np.where(same, np.maximum(scores / 1e-4, boxes / 0.1), np.inf)
            best = np.argmin(errors)
            assert errors[best] < 1, (n, slot, errors[best])
            left[best] = False
            worst = np.maximum(worst, (scores[best], boxes[best]))
    return worst


@pytest.mark.parametrize(
    ("format_name", "vocabulary", "without"),
    [
        ("stablehlo", "input", "flax,tensorflow"),
        pytest.param("stablehlo", "fixed", "flax,tensorflow", marks=pytest.mark.slow),
        pytest.param("savedmodel", "input", "jax", marks=pytest.mark.slow),
        ("savedmodel", "fixed", "jax"),
        ("onnx", "input", "jax,jax2onnx"),
        pytest.param("onnx", "fixed", "jax,jax2onnx", marks=pytest.mark.slow),
    ],
)
def test_a_format_gives_the_detections_of_the_model(
    loaded, pictures, wanted, tmp_path, format_name, vocabulary, without
):
    if format_name == "savedmodel":
        if jax.__version_info__ >= (0, 12):
            pytest.skip("TensorFlow 2.21 cannot read what jax 0.12 writes")
        pytest.importorskip("tensorflow")
    if format_name == "onnx":
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")
    options = ["--max_detections=20", "--rows=8"]
    options += [f"--names={','.join(NAMES)}"] if vocabulary == "fixed" else []
    assert write(loaded, tmp_path / "out", format_name, *options) == 0
    names = NAMES if vocabulary == "input" else []
    found, printed = outputs_and_prints(tmp_path / "out", pictures, without, names, tmp_path)
    assert wanted["mask"][0].sum() == 20 and wanted["mask"][1].sum() > 5
    assert len(set(wanted["labels"][0].tolist())) == 3 and not wanted["mask"][2].any()
    assert_same(found, wanted, 1)
    assert_same(found, wanted, 3)
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())
    # The example prints what is above the threshold, of what the file returns.
    limit = about["threshold"]["score_threshold"]
    lines = printed.splitlines()
    assert limit == FALLBACK and len(lines) == np.sum(wanted["scores"][0] > limit) > 0
    assert {line.split("\t")[0] for line in lines} <= set(NAMES)
    assert about["names"] == (NAMES if vocabulary == "fixed" else None)
    assert about["prompts"]["cat"] == "cat, a small animal with whiskers"
    for output in about["outputs"]:
        array = found[output["name"] + "3"]
        assert output["shape"] == ["batch", *array.shape[1:]] and output["dtype"] == array.dtype


@pytest.mark.parametrize("values", [{}, {"nms_iou": 0.7, "pre_nms_top_k": 9, "score": "alignment"}])
def test_detect_evaluate_and_export_decode_alike(loaded, values, pictures):
    """One config, of the checkpoint; only the threshold and the number of boxes differ."""
    loaded = dataclasses.replace(loaded, detect=dataclasses.replace(loaded.detect, **values))
    evaluated = loaded.detect.decoding
    limits = {"score_threshold": 0.0, "max_detections": 300}
    detector = Detector(loaded, **limits)
    served = served_model(loaded, NAMES, **limits)
    for config in (detector.predictor.config, served.config):
        assert dataclasses.replace(config, max_detections=1000) == evaluated
    for config in (Detector(loaded).predictor.config, served_model(loaded, NAMES).config):
        assert config.max_detections == 300
    images, sizes_ = pictures
    names = detector.encode(NAMES)
    every = detector.predictor.run_batch(images, sizes_, names, evaluated)
    best = detector.predictor.run_batch(images, sizes_, names)
    count = min(300, int(every.mask[0].sum()))
    assert count > 10
    np.testing.assert_array_equal(best.boxes[0][:count], every.boxes[0][:count])
    np.testing.assert_array_equal(best.scores[0][:count], every.scores[0][:count])


@pytest.mark.parametrize("pre_nms_top_k", [0, 9])
@pytest.mark.parametrize("runtime", ["tensorflow", "onnxruntime"])
def test_suppression_of_another_runtime_is_ours(runtime, pre_nms_top_k):
    """A crowd of 400 anchors and five names: more than the first pass of `class_nms` sees."""
    module = pytest.importorskip(runtime)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (2, 400, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 60, (2, 400, 2))], -1)
    boxes, scores = boxes.astype(np.float32), rng.uniform(-1, 1, (2, 5, 400)).astype(np.float32)
    config = DetectConfig(
        score_threshold=0.05, pre_nms_top_k=pre_nms_top_k, max_detections=300
    ).decoding
    if runtime == "tensorflow":
        found = saved_model.suppress(
            module, config, module.constant(boxes), module.constant(scores)
        )
        found = {key: value.numpy() for key, value in found.items()}
    else:
        pytest.importorskip("onnx")
        program = onnx_format.suppression(config, 400, "rows", 10).SerializeToString()
        session = module.InferenceSession(program)
        values = session.run(None, {"all_boxes": boxes, "all_scores": scores})
        found = dict(zip([output.name for output in session.get_outputs()], values))
    expected = class_nms(
        boxes,
        np.ones((2, 400), bool),
        lambda scores, ids: scores[:, ids],
        jax.numpy.asarray(scores),
        jax.numpy.arange(5)[None],
        iou_threshold=config.nms_iou,
        score_threshold=config.score_threshold,
        pre_nms_top_k=pre_nms_top_k,
        max_detections=300,
    )
    for key, value in zip(("boxes", "scores", "labels", "mask"), expected):
        np.testing.assert_array_equal(found[key], value)
    count = found["mask"].sum(1)
    assert (count > 150).all() if pre_nms_top_k == 0 else (count <= 45).all()


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["stablehlo", "savedmodel", "onnx"])
def test_swin_t_at_320_pixels_and_80_names(tmp_path, format_name):
    """Prints the table of docs/export.md, with `pytest -s`."""
    if format_name == "onnx":
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")
    if format_name == "savedmodel" and jax.__version_info__ >= (0, 12):
        pytest.skip("TensorFlow 2.21 cannot read what jax 0.12 writes")
    loaded, pictures, names = swin_t()
    served = served_model(loaded, names)
    wanted = {k: np.asarray(v) for k, v in jax.jit(served.detect_function())(*pictures).items()}
    assert wanted["mask"].sum(1).tolist() == [300, 300, 0]
    start = time.perf_counter(), time.process_time()
    assert write(loaded, tmp_path / "out", format_name, "--rows=80") == 0
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    without = {"stablehlo": "flax,tensorflow", "savedmodel": "jax", "onnx": "jax,jax2onnx"}[
        format_name
    ]
    found, _ = outputs_and_prints(tmp_path / "out", pictures, without, names, tmp_path)
    worst = [assert_same(found, wanted, count) for count in (1, 3)]
    print(
        f"{format_name}: {wall:.1f} s ({cpu:.1f} s of CPU) to export; worst {np.max(worst, axis=0)}"
    )


def swin_t():
    """Random Swin-T, two images on canvases of 320×320 pixels and an empty slot, 80 names."""
    graphdef, params = detclip.create(sizes.SWIN_T, 0)
    rng = np.random.default_rng(0)
    noisy = lambda p: np.asarray(p) + rng.normal(scale=0.02, size=p.shape).astype(np.float32)
    params |= {"head": jax.tree.map(noisy, params["head"]), "logit_bias": np.float32(0)}
    detect = DetectConfig(canvas=(320, 320))
    images = rng.integers(0, 256, (3, 40, 40, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    sizes_ = np.array([(320, 320), (200, 320), (0, 0)], np.int32)
    images[1, 200:] = images[2] = 0
    colors = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
    things = ("cat", "dog", "car", "tree", "lamp", "chair", "boat", "bird", "house", "shoe")
    names = [f"{color} {thing}" for color in colors for thing in things]
    return (
        LoadedModel(graphdef, params, sizes.SWIN_T, detect, 0, ["cat"], {}),
        (images, sizes_),
        names,
    )


def test_stablehlo_is_for_every_platform(loaded, tmp_path):
    assert write(loaded, tmp_path, "stablehlo", "--names=cat", "--canvas=64x64") == 0
    exported = jax_export.deserialize(bytearray((tmp_path / "detector.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(aval.shape) for aval in exported.in_avals] == ["(batch, 64, 64, 3)", "(batch, 2)"]


def test_tokenizer_gives_the_ids_of_training(tmp_path):
    from tokenizers import Tokenizer

    from detclipv2_jax.exporters.manifest import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer.json")
    texts = ["cat", "Traffic  Light", "", "a long text " * 9, "Straße 北京 don't", "9,5 €"]
    rows = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)
    np.testing.assert_array_equal([row.ids for row in rows], tokenize(texts))


def test_safetensors_is_read_without_this_package(loaded, tmp_path):
    assert write(loaded, tmp_path, "safetensors") == 0
    program = (
        "import sys, json; sys.modules['detclipv2_jax'] = sys.modules['jax'] = None\n"
        "from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], 'numpy') as file:\n"
        "    about = file.metadata()\n"
        "    total = float(sum(file.get_tensor(key).astype('f8').sum() for key in file.keys()))\n"
        "print(json.dumps([about, total]))"
    )
    line = [sys.executable, "-I", "-c", program, tmp_path / "model.safetensors"]
    about, total = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
    sums = [np.sum(leaf, dtype=np.float64) for leaf in jax.tree.leaves(loaded.params)]
    assert total == pytest.approx(sum(sums))
    assert json.loads(about["definitions"]) == DEFINITIONS and json.loads(about["names"]) == ["cat"]
    assert (
        json.loads(about["model"]) == json.loads(json.dumps(loaded.model.to_dict()))
        and about["step"] == "7"
    )


def test_the_code_in_the_card_loads_safetensors(loaded, pictures, tmp_path, monkeypatch, capsys):
    assert write(loaded, tmp_path, "safetensors") == 0
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures[0][0]).save("image.png")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace = {}
    exec(code.replace("image.jpg", "image.png"), namespace)
    settings = {
        "score_threshold": 0.0,
        "max_detections": 1000,
        "batch_size": 8,
        "definitions": "off",
    }
    detector = Detector(loaded, **settings)
    (direct,) = detector(["image.png"], ["cat", "traffic light"])
    np.testing.assert_array_equal(namespace["found"].boxes, direct.boxes)
    np.testing.assert_array_equal(namespace["found"].scores, direct.scores)
    assert "'traffic light'" in capsys.readouterr().out


def test_the_card(loaded, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    measures = {"standard": {"AP": 0.25, "APr": None}, "fixed": {"AP": 0.5, "APr": 0.125}}
    (run / "results.json").write_text(json.dumps({"dataset": "a/val.json", "step": 5, **measures}))
    line = [f"--checkpoint={run}", f"--output={tmp_path}", "--license=apache-2.0"]
    with checkpoint(loaded):
        assert door.main(line) == 0
    card = (tmp_path / "README.md").read_text()
    head = card.split("---\n")[1]
    assert 'license: "apache-2.0"\n' in head and "zero-shot-object-detection" in head
    assert (
        "On `val.json`, from 0 to 1, measured at step 5, not at the step of this checkpoint:"
        in card
    )
    assert "| | standard | fixed |\n|---|---|---|\n| AP | 0.2500 | 0.5000 |\n| APr | – |" in card
    assert "7 steps of a run of 2 epochs" in card and "| detection | objects365 |" in card
    assert "data: 1\n(definitions: 3). Initial weights: `swin.pth` (backbone)." in card
    assert card.endswith("## License\n\napache-2.0\n")
    assert "/somewhere" not in card
    assert "starts from 0.1 (a fallback" in card.replace("\n", " ")


def card_of(loaded, output):
    assert write(loaded, output, "safetensors") == 0
    return (output / "README.md").read_text()


def test_the_card_lists_the_data_that_really_was(loaded, tmp_path):
    data = {
        "skip_missing": True,
        "detection": {"sources": ["/home/ann/photos/detection"]},
        "image_text": {"sources": ["never_prepared"]},
    }
    skipping = dataclasses.replace(loaded, run=loaded.run | {"data": data})
    card = card_of(skipping, tmp_path / "old")
    assert "does not say which of the sources in its config existed" in card
    assert "never_prepared" not in card and "ann" not in card.split("## Metrics")[0].split("---")[2]
    known = dataclasses.replace(skipping, sources={"detection": {"detection": 1234}})
    card = card_of(known, tmp_path / "new")
    assert "| detection | detection (1,234 records) |" in card and "never_prepared" not in card
    card = card_of(
        dataclasses.replace(loaded, run=loaded.run | {"data": data | {"skip_missing": False}}),
        tmp_path / "all",
    )
    assert "| detection | detection |" in card and "/home" not in card


def test_files_have_the_umask_of_the_user_and_digests(loaded, tmp_path):
    before = os.umask(0o027)
    try:
        assert write(loaded, tmp_path / "out", "safetensors") == 0
    finally:
        os.umask(before)
    files = {path.name: path for path in (tmp_path / "out").glob("[!.]*")}  # a hidden record, too
    assert set(files) == {"model.safetensors", "README.md", "manifest.json"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o640}
    about = json.loads(files["manifest.json"].read_text())
    assert about["sha256"] == {
        name: hashlib.sha256(files[name].read_bytes()).hexdigest()
        for name in ("README.md", "model.safetensors")
    }
    assert about["threshold"]["score_threshold"] == FALLBACK


@pytest.mark.parametrize("after", [0, 100_000])
def test_a_full_disk_leaves_the_earlier_export(loaded, tmp_path, capsys, after):
    output = tmp_path / "out"
    assert write(loaded, output, "safetensors") == 0
    earlier = {path.name: path.read_bytes() for path in output.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    newer = dataclasses.replace(loaded, step=8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, limits[1]))
    try:
        status = write(newer, output, "safetensors")
        fresh = write(newer, tmp_path / "fresh", "safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == fresh == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 2 and "model.safetensors: cannot be written (File too large" in error
    )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == earlier
    assert not (tmp_path / "fresh").exists()


def test_a_stop_between_two_files_leaves_the_earlier_export(loaded, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert write(loaded, output, "safetensors") == 0
    earlier = {path.name: path.read_bytes() for path in output.iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.card, "render", stop)  # the model is written by then
    with pytest.raises(KeyboardInterrupt), checkpoint(dataclasses.replace(loaded, step=8)):
        export.run(door.parser().parse_args(["--checkpoint=run", f"--output={output}"]))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == earlier
    monkeypatch.undo()
    (output / ".export.partial").mkdir()  # of an export that was killed
    (output / ".export.partial" / "model.safetensors").write_bytes(b"half")
    assert write(dataclasses.replace(loaded, step=8), output, "safetensors") == 0
    assert json.loads((output / "manifest.json").read_text())["step"] == 8
    assert sorted(path.name for path in output.iterdir()) == sorted(earlier)


def test_the_threshold_of_the_checkpoint_goes_into_the_export(loaded, tmp_path):
    fit = {"score_threshold": 0.02, "f1": 0.5, "iou": 0.5, "dataset": "val.json", "step": 7}
    fitted = dataclasses.replace(loaded, threshold=fit)
    args = lambda *more: door.parser().parse_args(["--checkpoint=r", "--output=o", *more])
    assert export._built_in_threshold(args().score_threshold, fitted) == 0.02
    assert export._built_in_threshold(args().score_threshold, loaded) == 0.05
    assert export._built_in_threshold(args("--score_threshold=0.4").score_threshold, fitted) == 0.4
    assert write(fitted, tmp_path, "safetensors") == 0
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert about["threshold"] == {
        "score_threshold": 0.02,
        "score_threshold_from": "fitted on val.json at step 7: F1 0.50 at IoU 0.5",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--names=cat,Cat"], "name 2, 'Cat', is the same as name 1"),
        (["--names= ,"], "contains no name"),
        (["--names_file=/nowhere.txt"], "/nowhere.txt: no such file"),
        (["--canvas=800"], "--canvas=800 is not valid. Give height x width"),
        (["--canvas=8x8"], "from 32 to 8192"),
        (["--score_threshold=2"], "score_threshold is 2.0"),
        (["--rows=0"], "--rows=0"),
        (["--format=safetensors", "--names=cat"], "Leave --names, --names_file and --canvas out"),
    ],
)
def test_an_error_is_one_line(loaded, tmp_path, capsys, options, reason):
    assert write(loaded, tmp_path / "out", "stablehlo", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tensorflow_that_cannot_read_this_jax_is_reported(loaded, tmp_path, monkeypatch, capsys):
    tf = pytest.importorskip("tensorflow")

    def fail(*_):
        raise tf.errors.InvalidArgumentError(None, None, "Cannot deserialize computation")

    if jax.__version_info__ < (0, 12):
        monkeypatch.setattr(tf, "function", lambda *_, **__: fail)
    assert write(loaded, tmp_path / "out", "savedmodel", "--names=cat") == 2
    assert f"cannot read what jax {jax.__version__} writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format_name", "package", "reason"),
    [
        ("savedmodel", "tensorflow", "needs TensorFlow, which is not installed"),
        ("onnx", "jax2onnx", "pip install --no-deps jax2onnx"),
    ],
)
def test_a_missing_converter_is_reported(
    loaded, tmp_path, monkeypatch, capsys, format_name, package, reason
):
    monkeypatch.setitem(sys.modules, package, None)
    assert write(loaded, tmp_path / "out", format_name, "--names=cat") == 2
    assert reason in capsys.readouterr().err


def test_names_file_has_one_name_per_line(loaded, tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n traffic light, red \n")
    args = door.parser().parse_args(
        ["--checkpoint=run", "--output=out", f"--names_file={tmp_path}/names.txt"]
    )
    assert export._names(args) == ["cat", "traffic light, red"]
    served = served_model(loaded, export._names(args))
    assert served.names == ("cat", "traffic light, red") and served.texts.shape == (2, 64)
    with pytest.raises(UserError, match="is empty"):
        served_model(loaded, ["cat", ""])
