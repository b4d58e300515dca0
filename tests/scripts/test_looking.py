"""The scripts that show prepared data: statistics, and pages of batches."""

import importlib.util
import json
import subprocess
import sys

import pytest
import tiny_run
from miniature_archives import coco, image_entries, jpeg, mdetr, write_images, write_json
from PIL import Image

ROOT = tiny_run.ROOT


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def statistics_script():
    return script("data_statistics")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sources of three kinds, prepared from one folder of four images."""
    folder = tmp_path_factory.mktemp("archive")
    names = write_images(folder, 4, 120, 160)
    entries = image_entries(names, 120, 160)
    write_json(folder / "annotations/instances_train.json", coco(names) | {"images": entries})
    grounding = mdetr(names)
    for image in grounding["images"]:
        image |= {"height": "120", "width": "160"}
    write_json(folder / "annotations/phrases.json", grounding)
    lines = [json.dumps({"image": n, "caption": f"a <b>cat</b> & bus {n}"}) for n in names]
    (folder / "annotations/captions.jsonl").write_text("\n".join(lines))
    to = tmp_path_factory.mktemp("prepared")
    arguments = ["custom", f"--from={folder}", f"--to={to}", "--jobs=1"]
    assert script("prepare_data").main(arguments) == 0
    return to


def test_statistics_of_every_kind(statistics_script, data, tmp_path, capsys):
    kinds = ("detection", "grounding", "image_text")
    evaluation = tmp_path / "evaluation"
    (evaluation / "images").mkdir(parents=True)
    (evaluation / "images" / "7.jpg").write_bytes(jpeg(120, 160, seed=2))
    (evaluation / "images" / "8.jpg").write_bytes(jpeg(120, 160, seed=99))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 8, 9)]  # the last is not there
    truth = write_json(evaluation / "val.json", {"images": images})
    arguments = [*(str(data / kind) for kind in kinds), f"--output={tmp_path}", "--jobs=1"]
    arguments += ["--duplicates", f"--evaluation={truth}", f"--images={evaluation / 'images'}"]
    assert statistics_script.main(arguments) == 0
    found = json.loads((tmp_path / "statistics.json").read_text())
    sources = {name.rsplit("_", 1)[-1]: figures for name, figures in found["sources"].items()}
    assert [figures["records"] for figures in sources.values()] == [4, 8, 4]
    boxes = sources["detection"]["boxes"]
    assert boxes["boxes_a_record"][0] == 0 and boxes["boxes_a_record"][-1] == 2
    assert boxes["without_boxes"] == 0.25 and boxes["small"] == 1.0
    assert sources["detection"]["unused"] == 1  # "bus"
    assert "boxes" not in sources["text"] and sources["text"]["captions"] == 4
    assert list(found["repeated"].values()) == [0, 4, 0]  # each with two captions
    assert list(found["overlaps"].values()) == [4, 4, 8]
    assert list(found["leaked"].values()) == [1, 1, 1]
    printed = capsys.readouterr().out
    assert "(2 found)" in printed and "record 2 and 7.jpg" in printed
    with Image.open(tmp_path / "statistics.png") as picture:
        assert picture.width > 1000


def test_statistics_report_errors(statistics_script, data, tmp_path, capsys):
    one, output = str(data / "detection"), f"--output={tmp_path}"
    for arguments, message in (
        ([str(tmp_path / "none"), output], "no prepared source here"),
        ([one, one, output], "another source is called"),
        ([one, output, "--evaluation=val.json"], "--evaluation needs --duplicates and --images"),
    ):
        assert statistics_script.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["statistics.json", "statistics.png"])
def test_statistics_replace_no_file_of_somebody_else(
    statistics_script, data, tmp_path, capsys, file
):
    (tmp_path / file).write_text("of mine")
    assert statistics_script.main([str(data / "detection"), f"--output={tmp_path}"]) == 2
    assert f"{file}: exists, and this command did not write it" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(file, "of mine")]


def page(data, output, *flags):
    command = [sys.executable, str(ROOT / "scripts/show_batches.py"), f"--output={output}"]
    command += [f"--config={ROOT}/configs/coco_format.py:nano", f"--config.data_dir={data}", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=tiny_run.environment())


def test_a_page_of_batches(data, tmp_path):
    process = page(data, tmp_path, "--steps=2", "--source=image_text", "--pictures=3")
    assert process.returncode == 0, process.stderr
    html = (tmp_path / "index.html").read_text()
    assert html.count("<figure>") == 6 and "image_text, record" in html
    assert "a &lt;b&gt;cat&lt;/b&gt; &amp; bus" in html and "<b>cat" not in html
    assert "4 of 32 slots filled" in html and "0 negatives" in html
    assert len(list(tmp_path.glob("step-*-image_text/slot-*.png"))) == 6
    process = page(data, tmp_path, "--steps=1", "--kind=detection", "--step=1")
    assert process.returncode == 0, process.stderr
    html = (tmp_path / "index.html").read_text()
    assert '<span class="name">traffic light</span>' in html.lower()
    assert '<span class="negative">bus</span>' in html


def test_a_page_replaces_no_file_of_somebody_else(data, tmp_path):
    (tmp_path / "index.html").write_text("of mine")
    process = page(data, tmp_path, "--steps=1")
    assert process.returncode == 2 and "index.html: exists" in process.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("index.html", "of mine")]


def test_a_page_of_an_unknown_source_is_refused(data, tmp_path):
    process = page(data, tmp_path, "--source=cc15m")
    assert process.returncode == 2
    assert "--source=cc15m: not a source of the config. Use one of detection, " in process.stderr
