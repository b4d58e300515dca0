"""Damaged checkpoints are passed over or refused, and the message says which one is used."""

import argparse
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import job
from detclipv2_jax.inference import checkpoint, checkpoint_files
from detclipv2_jax.training import initialize, state
from detclipv2_jax.training.checkpointer import Checkpointer
from detclipv2_jax.training.optimizer import OptimizerConfig, create

SCORES = {2: 0.7, 4: 0.8, 6: 0.9}  # the newest is the best


def save(directory, scores, poison=None):
    """Save a checkpoint per score; the one of step `poison` has a NaN in its average."""
    _, params = tiny_model.parts()
    new = state.create(params, create(OptimizerConfig(), params, 10))
    meta = {"config": {"model": tiny_model.CONFIG.to_dict(), **tiny_model.loaded().run}}
    saver = Checkpointer(directory, 3)
    for step, score in scores.items():
        now = dataclasses.replace(new, step=jnp.asarray(step, jnp.int32))
        if step == poison:
            leaves, structure = jax.tree.flatten(new.ema)
            leaves[5] = leaves[5].at[(0,) * leaves[5].ndim].set(np.inf)
            now = dataclasses.replace(now, ema=jax.tree.unflatten(structure, leaves))
        items = saver._items(now, meta | {"names": ["cat"], "total_steps": 6}, score)
        saver._writing = step
        saver._manager.save(step, args=checkpoint.ocp.args.Composite(**items))
        saver.wait()
    saver.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, SCORES)
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """A run with intact checkpoints of three steps, which a test may damage."""
    return shutil.copytree(saved, tmp_path / "run")


def flip(path, bit=1000):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("item", ["model", "state", "meta", "digests.sha256"])
def test_a_flipped_bit_is_found_and_the_one_before_used(run, item, capsys):
    path = run / "checkpoints/6" / item
    flip(largest(path) if path.is_dir() else path)
    assert checkpoint.load_model(run).step == 4
    warning = capsys.readouterr().err
    assert f"warning: {run}/checkpoints/6 is damaged ({item}" in warning
    assert warning.endswith("); using the checkpoint of step 4 instead\n")
    assert checkpoint_files.newest_intact(run) == 4
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "6"]  # as it was


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_missing_file_is_damage_and_not_another_model(run, name, is_old, capsys):
    path = run / "checkpoints/6"
    (path / "model" / name).unlink()
    if is_old:
        make_old(path)
    assert checkpoint.load_model(run).step == 4
    reason = re.search(r"6 is damaged \((.*)\); using", capsys.readouterr().err)[1]
    assert "another model" not in reason
    assert is_old or reason == f"model/{name} is missing"


def make_old(path):
    """Make a checkpoint as versions without digests wrote it."""
    (path / "digests.sha256").unlink()
    meta = json.loads((path / "meta/metadata").read_text())
    assert meta.pop("digests") is True
    (path / "meta/metadata").write_text(json.dumps(meta))


def test_an_old_checkpoint_loads_and_a_line_says_that_it_has_no_digests(run, capsys):
    make_old(run / "checkpoints/6")
    assert checkpoint.load_model(run).step == 6
    assert checkpoint.load_model(run).step == 6
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"note: {run}/checkpoints/6 has no digests, because an older version")


def test_a_list_that_is_gone_is_damage(run, capsys):
    (run / "checkpoints/6/digests.sha256").unlink()
    assert checkpoint.load_model(run).step == 4
    assert "6 is damaged (digests.sha256 is missing); using" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [("", 4), ("checkpoints/4", None)])
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(run, wanted):
    flip(largest(run / "checkpoints/4/model"))
    directory, step = wanted
    with pytest.raises(UserError) as error:
        checkpoint.load_model(run / directory, step)
    found = re.fullmatch(
        r"(.*) is damaged: model/.* has changed since it was written\. Use the checkpoint of step "
        r"2 or 6, which is intact\.",
        str(error.value),
    )
    assert found[1] == f"{run}/checkpoints/4"
    for other in (2, 6):
        flip(largest(run / f"checkpoints/{other}/model"))
    with pytest.raises(UserError, match="No other checkpoint there is intact"):
        checkpoint.load_model(run / directory, step)


def test_one_checkpoint_may_be_named_by_its_directory(run):
    assert checkpoint.load_model(run / "checkpoints/4").step == 4
    assert checkpoint.steps(run / "checkpoints/4") == [4]
    assert checkpoint.best_step(run / "checkpoints/2") == 2
    assert initialize.check_same_function(tiny_model.CONFIG, str(run / "checkpoints/4")) is None


def test_without_an_intact_checkpoint_each_is_named(run):
    for step in SCORES:
        flip(largest(run / f"checkpoints/{step}/state"))
    with pytest.raises(UserError, match="has no intact checkpoint: .*6 is .*4 is .*2 is damaged"):
        checkpoint.load_model(run)


def test_the_best_checkpoint_is_the_best_intact_one(tmp_path, capsys):
    save(tmp_path, {2: 0.7, 4: 0.9, 6: 0.8})
    assert checkpoint.best_step(tmp_path) == checkpoint.load_model(tmp_path).step == 4
    assert "using the checkpoint of step 4, the best on the validation" in capsys.readouterr().err
    flip(largest(tmp_path / "checkpoints/4/model"))
    assert checkpoint.best_step(tmp_path) == checkpoint.load_model(tmp_path).step == 6
    warning = capsys.readouterr().err
    assert "4 is damaged (model/" in warning and "the best" not in warning
    (tmp_path / "checkpoints/6/meta/metadata").unlink()
    assert checkpoint.best_step(tmp_path) == 2


def test_values_that_are_not_finite_are_damage(tmp_path, capsys):
    save(tmp_path, {2: 0.5, 4: 0.6}, poison=4)
    assert checkpoint.load_model(tmp_path).step == 2
    warning = capsys.readouterr().err
    assert re.search(r"4 is damaged \(\w+/.* has values that are not finite\); using", warning)
    with pytest.raises(UserError, match="not finite. Use the checkpoint of step 2, which is"):
        checkpoint.load_model(tmp_path, 4)


def test_a_run_is_finished_whatever_is_damaged(run):
    assert checkpoint.is_finished(run)
    (run / "checkpoints/6/meta/metadata").write_text("{")
    assert checkpoint.is_finished(run)
    assert checkpoint.stored_model(run) == tiny_model.CONFIG


def test_evaluate_passes_over_damage_unless_the_step_is_asked_for(run, capsys):
    flip(largest(run / "checkpoints/6/model"))
    parse = lambda step: argparse.Namespace(checkpoint=run, step=step, follow=False)
    assert job._chosen_steps(parse("newest")) == [4]
    assert "using the checkpoint of step 4" in capsys.readouterr().err
    assert job._chosen_steps(parse("best")) == [4]
    assert job._evaluate_checkpoint(parse("all"), [], 6, run) is None
    assert "6 is damaged: model/" in capsys.readouterr().err
    with pytest.raises(UserError, match="6 is damaged"):
        job._evaluate_checkpoint(parse([6]), [], 6, run)


def test_what_people_put_next_to_checkpoints_is_none(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for name in ("600", "400", "000700", "800.backup", "900 (copy)", "\u00b2", "9" * 99):
        (root / name / "meta").mkdir(parents=True)
    (root / "1000").write_text("a file")
    (root / ".DS_Store").write_text("x")
    assert checkpoint_files.steps(tmp_path / "run") == [400, 600]
    assert checkpoint_files.located(root / "600") == (root, 600)
    assert checkpoint_files.steps(root / "000700") == []


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    (tmp_path / "600" / "meta").mkdir(parents=True)
    (tmp_path / "600" / "meta" / "metadata").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(checkpoint_files.DamagedError, match="it is a pointer of Git LFS"):
        checkpoint_files.read_meta(tmp_path / "600")
