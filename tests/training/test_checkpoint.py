import dataclasses
import gc
import json
import resource
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.sharding import NamedSharding, PartitionSpec

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation.config import EvalConfig
from detclipv2_jax.inference import checkpoint
from detclipv2_jax.models import detclip, parameters
from detclipv2_jax.training import checkpointer, optimizer, sharding, spikes, state
from detclipv2_jax.training.checkpointer import Checkpointer, abstract_state
from detclipv2_jax.training.optimizer import OptimizerConfig

CONFIG = {"model": tiny_model.CONFIG.to_dict(), "eval": config_dict.to_dict(EvalConfig())}
META = {"config": CONFIG, "names": ["cat", "dog"], "seconds": {}}
META = json.loads(json.dumps(META))  # lists where the config had tuples
LAST_GOOD = "The last good checkpoint is that of step 1."


def _state(seed=0, step=0):
    _, params = tiny_model.parts(seed)
    rule = optimizer.create(OptimizerConfig(), params, 10)
    return dataclasses.replace(state.create(params, rule), step=jnp.asarray(step, jnp.int32))


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
    old = _state(step=3)
    old = dataclasses.replace(old, ema=jax.tree.map(lambda p: p + 1, old.params))
    one = sharding.make_mesh(1)
    old = jax.device_put(old, sharding.state_shardings(one, old))
    saver = Checkpointer(tmp_path, 2)
    saver.save(old, META, None)
    saver.close()

    four = sharding.make_mesh(2, 2)
    shardings = sharding.state_shardings(four, old)
    new, meta = Checkpointer(tmp_path, 2).restore(abstract_state(old, shardings))
    jax.tree.map(np.testing.assert_array_equal, new, old)
    assert meta == META | {"score": None, "digests": True}
    assert all(leaf.sharding.mesh.size == 4 for leaf in jax.tree.leaves(new))


def test_a_run_from_before_the_last_kind_of_data_continues(tmp_path):
    old = jax.device_put(_small(3))
    count = len(old.norms.seen) - 1
    seen = jnp.arange(1, count + 1, dtype=jnp.int32)
    norms = spikes.UsualNorms(jnp.full(count, 2.5), seen, jnp.zeros(count, jnp.int32))
    saver = Checkpointer(tmp_path, 2)
    saver.save(dataclasses.replace(old, norms=norms), META, None)
    saver.close()

    two = sharding.make_mesh(2)
    shardings = sharding.state_shardings(two, old)
    new, _ = Checkpointer(tmp_path, 2).restore(abstract_state(old, shardings))
    assert new.norms.log_norm.tolist() == [2.5] * count + [0]
    assert new.norms.seen.tolist() == [*range(1, count + 1), 0]
    assert int(new.step) == 3
    jax.tree.map(np.testing.assert_array_equal, new.moments, old.moments)
    assert all(leaf.sharding.mesh.size == 2 for leaf in jax.tree.leaves(new.norms))


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path):
    saver = Checkpointer(tmp_path, 2)
    for step, score in [(1, None), (2, 0.9), (3, 0.1), (4, None), (5, 0.2), (6, None)]:
        saver.save(_state(step=step), META, score)
    saver.close()
    assert checkpoint.steps(tmp_path) == [2, 5, 6]


def _small(step):
    params = {name: jnp.ones((64, 64)) for name in ("logit_scale", "logit_bias", "text_projection")}
    small = state.create(params, optimizer.create(OptimizerConfig(), params, 10))
    return dataclasses.replace(small, step=jnp.asarray(step, jnp.int32))


def _save_scores(directory, scores):
    saver = Checkpointer(directory, 2)
    for step, score in scores.items():
        saver.save(_small(step), META, score)
    saver.close()
    return checkpoint.steps(directory)


def test_a_restart_knows_the_best_checkpoint(tmp_path):
    """Scores are read from disk at the start."""
    assert _save_scores(tmp_path, {1: 3.0}) == [1]
    assert _save_scores(tmp_path, {2: 1.0, 3: None}) == [1, 2, 3]
    assert _save_scores(tmp_path, {4: 2.0, 5: 1.0, 6: None}) == [1, 5, 6]
    assert checkpoint.best_step(tmp_path) == 1
    assert _save_scores(tmp_path, {7: 3.5, 8: 3.5, 9: 0.0}) == [8, 9]


def test_the_best_checkpoint_is_kept_when_the_newest_one_is_damaged(tmp_path, capsys):
    """The damaged one has a meta that cannot be read, and is renamed."""
    assert _save_scores(tmp_path, {1: 3.0, 2: 1.0}) == [1, 2]
    _cut(tmp_path / "checkpoints/2")
    saver, small = Checkpointer(tmp_path, 2), _small(0)
    one_device = sharding.replicated(sharding.make_mesh(1))
    saver.restore(abstract_state(small, jax.tree.map(lambda _: one_device, small)))
    for step, score in [(2, 1.0), (3, 2.0), (4, 1.0)]:
        saver.save(_small(step), META, score)
    saver.close()
    assert checkpoint.steps(tmp_path) == [1, 3, 4]


def _cut(directory):
    """Cut every file to half its size, as a disk that filled up leaves them."""
    for file in directory.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _without_digests(path):
    """Make a checkpoint as an older version wrote it."""
    (path / "digests.sha256").unlink()
    meta = json.loads((path / "meta/metadata").read_text())
    del meta["digests"]
    (path / "meta/metadata").write_text(json.dumps(meta))


def _target():
    return abstract_state(_state(), sharding.state_shardings(sharding.make_mesh(1), _state()))


def _saved(directory, *steps):
    saver = Checkpointer(directory, 3)
    for step in steps:
        saver.save(_state(step=step), META, None)
    saver.close()
    return directory / "checkpoints"


@pytest.mark.parametrize("item", ["model", "state", "meta", "old model", "old state", "old meta"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, item, capsys):
    root = _saved(tmp_path, 1, 2)
    if item.startswith("old"):
        _without_digests(root / "2")
    _cut(root / "2" / item.removeprefix("old "))
    saver = Checkpointer(tmp_path, 3)
    restored, _ = saver.restore(_target())
    assert int(restored.step) == 1 and saver.latest == 1
    printed = capsys.readouterr().out
    assert f"{root}/2 must not be used (" in printed
    assert ") and is renamed to DAMAGED-2; resuming from step 1 instead\n" in printed
    assert (root / "DAMAGED-2").is_dir()
    saver.save(_state(step=2), META, None)  # the run repeats that step
    saver.close()
    assert Checkpointer(tmp_path, 3).latest == 2
    _cut(root / "2" / item.removeprefix("old "))
    Checkpointer(tmp_path, 3).restore(_target())
    assert sorted(path.name for path in root.iterdir()) == ["1", "DAMAGED-2", "DAMAGED-2-2"]


def test_no_intact_checkpoint_is_an_error(tmp_path):
    root = _saved(tmp_path, 1)
    _cut(root / "1")
    with pytest.raises(UserError, match="renamed to DAMAGED-1. No checkpoint of the run is intact"):
        Checkpointer(tmp_path, 3).restore(_target())


def test_a_checkpoint_without_room_to_load_it_is_not_set_aside(tmp_path, monkeypatch):
    root, saver = _saved(tmp_path, 1, 2), Checkpointer(tmp_path, 3)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(saver._manager, "restore", full)
    with pytest.raises(UserError, match="2: the checkpoint cannot be loaded .*out of memory"):
        saver.restore(_target())
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert not list(root.glob("DAMAGED*"))


def _save_unchecked(directory, step, **changes):
    """Write a checkpoint with other values in its state, as older versions wrote all states."""
    saver = Checkpointer(directory, 3)
    state = dataclasses.replace(_state(step=step), **changes)
    items = saver._items(state, META, None)
    saver._writing = step
    assert saver._manager.save(step, args=checkpointer.ocp.args.Composite(**items))
    saver.close()


@pytest.mark.parametrize("part", ["params", "ema", "moments"])
def test_a_state_that_is_not_finite_is_not_resumed_from(tmp_path, part, capsys):
    _saved(tmp_path, 1)
    _save_unchecked(tmp_path, 2, **{part: getattr(_with_nan(_state(), part), part)})
    restored, _ = Checkpointer(tmp_path, 3).restore(_target())
    assert int(restored.step) == 1
    printed = capsys.readouterr().out
    assert f"2 must not be used ({part}/" in printed and "are not finite) and is" in printed


def test_a_state_whose_updates_were_skipped_is_resumed_from_only_if_there_is_no_other(
    tmp_path, capsys
):
    for step in (1, 2):
        _save_unchecked(tmp_path, step, skipped_in_row=jnp.asarray(2, jnp.int32))
    restored, _ = Checkpointer(tmp_path, 3).restore(_target())
    assert int(restored.step) == 1
    assert "(the last 2 updates before it were skipped)" in capsys.readouterr().out


def _with_nan(state, part):
    leaves, structure = jax.tree.flatten(getattr(state, part))
    leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].set(np.nan)
    return dataclasses.replace(state, **{part: jax.tree.unflatten(structure, leaves)})


def test_a_state_that_is_not_finite_is_not_saved_and_ends_the_run_at_the_third(tmp_path, capsys):
    saver = Checkpointer(tmp_path, 3)
    saver.save(_state(step=1), META, None)
    for step, part in [(2, "params"), (3, "moments")]:
        saver.save(_with_nan(_state(step=step), part), META, None)
        printed = capsys.readouterr().out
        assert f"the state of step {step} is not saved, because {part}/" in printed
        assert "values that are not finite" in printed and LAST_GOOD in printed
    with pytest.raises(UserError, match="3 in a row have failed.*step 1. Resume with a lower"):
        saver.save(_with_nan(_state(step=4), "ema"), META, None)
    with pytest.raises(UserError, match="last checkpoint could not .*step 1. Resume with a lower"):
        saver.close()
    assert checkpoint.steps(tmp_path) == [1]


def test_the_check_on_the_devices_agrees():
    for part in ("params", "ema", "moments"):
        assert not checkpointer.all_finite(jax.tree.leaves(_with_nan(_state(), part)))
    assert checkpointer.all_finite(jax.tree.leaves(_state()))
    assert checkpointer.not_finite(_state()) == ""


def test_nothing_is_saved_while_updates_are_skipped_but_the_last_state(tmp_path, capsys):
    saver, skipped = Checkpointer(tmp_path, 3), {"skipped_in_row": jnp.asarray(2, jnp.int32)}
    assert saver.save(_state(step=1), META, None)
    assert not saver.save(dataclasses.replace(_state(step=2), **skipped), META, None)
    assert saver.latest == 1
    last = dataclasses.replace(_state(step=3), **skipped)
    assert saver.save(last, META | {"total_steps": 3}, None, is_last=True)
    saver.close()
    assert "the last 2 updates of the run were skipped" in capsys.readouterr().out
    restored, _ = Checkpointer(tmp_path, 3).restore(_target())
    assert int(restored.step) == 3  # of a finished run


def test_a_run_falls_back_behind_a_state_from_which_every_update_was_skipped(tmp_path):
    saver = Checkpointer(tmp_path, 1)
    for step in (2, 4):
        saver.save(_small(step), META, None)
    found = saver.fall_back_before(6)  # an update of step 5 was applied: 4 is good
    assert found == "The last good checkpoint is that of step 4."
    found = saver.fall_back_before(5)
    assert found == (
        "The last good checkpoint is that of step 2. No update from DAMAGED-4 was applied."
    )
    assert checkpoint.steps(tmp_path) == [2]
    assert saver.fall_back_before(3) == "The last good checkpoint is that of step 2."
    assert checkpoint.steps(tmp_path) == [2]  # the only one


def test_a_full_disk_is_a_warning_twice_and_then_ends_the_run(tmp_path, monkeypatch, capsys):
    saver = Checkpointer(tmp_path, 3)
    saver.save(_state(step=1), META, None)
    saver.wait()
    whole = saver._manager.save

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver._manager, "save", full)
    for step in (2, 3):
        saver.save(_state(step=step), META, None)
        printed = capsys.readouterr().out
        assert f"the checkpoint of step {step} could not be written" in printed
        assert "No space left on device" in printed and LAST_GOOD in printed
    with pytest.raises(UserError, match=f"; 3 in a row have failed. {LAST_GOOD} Make"):
        saver.save(_state(step=4), META, None)
    monkeypatch.setattr(saver._manager, "save", whole)  # room was made
    saver.save(_state(step=5), META, None)
    saver.close()
    assert Checkpointer(tmp_path, 3).latest == 5


def test_a_run_survives_a_full_disk_and_saves_again_when_there_is_room(small_disk, fill, capsys):
    """The state takes 7 MB on disk; with 1.5 MB left its arrays are written in part."""
    saver = Checkpointer(small_disk, 1)
    saver.save(_state(step=1), META, None)
    saver.wait()
    filling = fill(small_disk, 1_500_000)
    for step in (2, 3):
        saver.save(_state(step=step), META, None)
        saver.wait()
        printed = capsys.readouterr().out
        assert f"the checkpoint of step {step} could not be written" in printed
        assert "No space left on device" in printed and LAST_GOOD in printed
        assert not [t for t in threading.enumerate() if "orbax" in type(t).__module__]
    filling.unlink()
    saver.save(_state(step=4), META, None)
    saver.wait()
    assert saver.latest == 4 and "could not" not in capsys.readouterr().out
    saver.save(_state(step=5), META, None)  # also removes what tensorstore wrote after the failure
    saver.close()
    assert sorted(p.name for p in (small_disk / "checkpoints").iterdir()) == ["4", "5"]
    restored, _ = Checkpointer(small_disk, 1).restore(_target())
    jax.tree.map(np.testing.assert_array_equal, restored.params, _state().params)


def _savers():
    """Return the threads of Orbax that are saving."""
    return [t.name for t in threading.enumerate() if type(t).__module__.startswith("orbax.")]


def test_a_lost_directory_is_a_warning_and_may_come_back(tmp_path, capsys):
    root = _saved(tmp_path, 1)
    saver = Checkpointer(tmp_path, 3)
    root.rename(tmp_path / "away")
    root.write_text("in its place")
    before = _savers()
    saver.save(_state(step=2), META, None)
    printed = capsys.readouterr().out
    assert "checkpoint of step 2 could not be written" in printed and "that of step 1." in printed
    assert _savers() == before, "no thread waits for a directory that cannot be created"
    root.unlink()
    (tmp_path / "away").rename(root)
    saver.save(_state(step=3), META, None)
    saver.close()
    assert Checkpointer(tmp_path, 3).latest == 3


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    root = _saved(tmp_path, 1)
    saver = Checkpointer(tmp_path, 3)
    root.rename(tmp_path / "away")
    root.write_text("in its place")
    saver.save(_state(step=2), META, None)
    with pytest.raises(UserError, match=f"last checkpoint could not .*{LAST_GOOD} Make"):
        saver.close()


def test_a_failed_thread_does_not_wait_for_the_other_processes(monkeypatch):
    calls = []
    barrier = lambda **_: calls.append("barrier")
    monkeypatch.setattr(checkpointer.multihost, "get_barrier_sync_fn", lambda: barrier)
    checkpointer._barrier_unless_failed(key="done", timeout_ms=1)
    assert calls == ["barrier"]
    with pytest.raises(OSError, match="full"):
        try:
            raise OSError("full")
        finally:
            checkpointer._barrier_unless_failed(key="done", timeout_ms=1)
    assert calls == ["barrier"]


def test_a_workdir_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run/checkpoints: cannot be created or read"):
        Checkpointer(tmp_path / "file" / "run", 3)


def _save_often(directory, saves, look_every):
    """Return (Python's allocated blocks, MB of resident memory) after every `look_every` saves."""
    small, saver, seen = _small(0), Checkpointer(directory, 3), []
    for step in range(1, saves + 1):
        now = dataclasses.replace(small, step=jnp.asarray(step, jnp.int32))
        saver.save(now, META, step % 37 / 37 if step % 10 == 0 else None)
        if step % look_every == 0:
            saver.wait()
            gc.collect()
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            seen.append((sys.getallocatedblocks(), pages * resource.getpagesize() / 1e6))
    saver.close()
    return seen


def test_a_save_leaves_nothing_in_memory(tmp_path):
    """Unpatched, tensorstore keeps about 300 strings and lists per save."""
    (before, _), (after, _) = _save_often(tmp_path, 60, 30)
    assert after - before < 30 * 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_over_thousands_of_saves(tmp_path):
    """Python's objects grow by 16 per save (1.2 KB): tensorstore keeps the JSON of two new paths.

    The used part of the C heap stays the same; its free part grows by 4 MB at first.
    """
    seen = _save_often(tmp_path, 2400, 400)
    print([f"{megabytes:.1f} MB" for _, megabytes in seen])
    assert seen[-1][0] - seen[0][0] < 20 * 2000
    assert seen[-1][1] - seen[0][1] < 2 * 2.4 + 5


def test_saving_the_same_step_twice_is_harmless(tmp_path):
    saver = Checkpointer(tmp_path, 2)
    saver.save(_state(step=1), META, None)
    saver.save(_state(step=1), META, None)
    saver.close()
    assert Checkpointer(tmp_path, 2).latest == 1


def test_load_model_returns_the_averaged_parameters_and_names(tmp_path):
    old = dataclasses.replace(_state(step=4), ema=tiny_model.parts(1)[1])
    saver = Checkpointer(tmp_path, 1)
    saver.save(old, META, None)
    saver.close()
    for directory in (tmp_path, tmp_path / "checkpoints"):
        loaded = checkpoint.load_model(directory)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, old.ema)
        assert (loaded.step, loaded.names) == (4, ["cat", "dog"])
        detclip.build(loaded.graphdef, loaded.params)


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    saver = Checkpointer(tmp_path, 3)
    saver.save(_state(step=1), META, None)
    saver.close()
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "1", root / "2.orbax-checkpoint-tmp-0")
    assert checkpoint.load_model(tmp_path).step == 1
    assert Checkpointer(tmp_path, 3).latest == 1


@pytest.mark.parametrize(
    ("directory", "step", "message"),
    [("nowhere", None, "no checkpoint in .*nowhere"), (".", 9, "checkpoint of step 9: it has 1")],
)
def test_a_missing_checkpoint_is_a_user_error(tmp_path, directory, step, message):
    saver = Checkpointer(tmp_path, 1)
    saver.save(_state(step=1), META, None)
    saver.close()
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(tmp_path / directory, step)


def test_a_checkpoint_of_another_model_is_refused_with_the_name_of_a_parameter(tmp_path):
    saver = Checkpointer(tmp_path, 1)
    saver.save(_state(step=1), META, None)
    saver.close()
    other = dataclasses.replace(
        tiny_model.CONFIG, swin=dataclasses.replace(tiny_model.CONFIG.swin, embed_dim=16)
    )
    _, params = detclip.abstract(other)
    mesh = sharding.make_mesh(1)
    rule = optimizer.create(OptimizerConfig(), params, 10)
    zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    target = jax.eval_shape(lambda: state.create(zeros(), rule))
    target = abstract_state(target, jax.tree.map(lambda _: sharding.replicated(mesh), target))
    message = "of another model: backbone/.* is .* in the checkpoint, .* in this config"
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path, 1).restore(target)
    wrong = META | {"config": META["config"] | {"model": config_dict.to_dict(other)}}
    saver = Checkpointer(tmp_path / "b", 1)
    saver.save(_state(step=1), wrong, None)
    saver.close()
    with pytest.raises(UserError, match="of another model"):
        checkpoint.load_model(tmp_path / "b")


def test_optimizer_state_and_average_are_sharded_like_their_parameters():
    mesh, tree = sharding.make_mesh(1, 4), _state()
    shardings = sharding.state_shardings(mesh, tree)
    wanted = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    for part in (shardings.params, shardings.ema, shardings.moments.mean, shardings.moments.square):
        paths = parameters.parameter_paths(part)
        assert paths["text/token_embedding"] == wanted
        split = [path for path, value in paths.items() if not value.is_fully_replicated]
        assert len(split) > 10 and all(
            path.endswith(("embedding", "projection", "kernel")) for path in split
        )
    jax.device_put(tree, shardings)
