"""The benchmark of the training step: parts, tables, and agreement with the PyTorch model."""

import dataclasses
import functools
import importlib
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_run

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import flops
from detclipv2_jax.training.objective import LossConfig, ProposalConfig
from detclipv2_jax.training.optimizer import OptimizerConfig

SCRIPTS = tiny_run.ROOT / "scripts/benchmarks"
LOSS = LossConfig(proposals=ProposalConfig(group=2, k=6))


least_bytes = importlib.import_module("least_bytes")
step_parts = importlib.import_module("step_parts")
benchmark = importlib.import_module("benchmark_train")


@functools.cache
def parts_of(kind, cfg=tiny_model.CONFIG):
    return step_parts.parts(cfg, LOSS, OptimizerConfig(), kind, (64, 64), 2, 8, boxes=3, texts=3)


def batch_of(kind, cfg=tiny_model.CONFIG):
    abstract = step_parts.abstract_batch(cfg, kind, (64, 64), 2, 8, boxes=3, texts=3)
    return step_parts.random_batch(abstract, cfg.text.vocab)


def test_parts_of_a_step():
    dense = ["assignment", "losses", "optimizer"]
    encoders = ["backbone", "neck", "head", "deformable sampling", "text"]
    assert list(parts_of("detection")) == encoders + dense
    captioned = parts_of("image_text")
    assert list(captioned) == encoders + ["choice of regions", "losses", "optimizer"]
    whole = flops.step(tiny_model.CONFIG, "image_text", (64, 64), 2, 8, proposals=6, group=2)
    assert sum(part.flops for part in captioned.values()) == pytest.approx(sum(whole.values()))


def test_a_part_gives_outputs_and_the_gradient_by_parameters_and_activations():
    part = parts_of("detection")["neck"]
    (params, maps), fixed = step_parts.concrete(part, batch_of("detection"))
    levels, (by_params, by_maps) = jax.jit(part.fn)((params, maps), fixed)
    assert [x.shape for x in levels] == [(2, n, n, 8) for n in (8, 4, 2, 1, 1)]
    assert jax.tree.structure(by_params) == jax.tree.structure(params)
    assert [x.shape for x in by_maps] == [x.shape for x in maps]
    # The neck is linear: outputs · cotangents changes along a map as its gradient says.
    pull = lambda levels: sum(jnp.vdot(a, b) for a, b in zip(levels, fixed["cotangent"]))
    moved, _ = jax.jit(part.fn)((params, (maps[0] + 1.0, *maps[1:])), fixed)
    change = float(pull(moved) - pull(levels))
    assert change == pytest.approx(float(by_maps[0].sum()), rel=1e-3)


def test_the_optimizer_renews_what_it_is_given():
    part = parts_of("detection")["optimizer"]
    learned, fixed = step_parts.concrete(part, batch_of("detection"))
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(learned))  # means of squares
    assert jax.tree.structure(jax.eval_shape(part.fn, learned, fixed)) == jax.tree.structure(
        learned
    )
    assert part.donate == (0,)


def test_tokens_begin_and_end_as_clip_s_do():
    tokens = batch_of("image_text").tokens
    assert (tokens[:, 0] == 49406).all() and (tokens.max(axis=1) == 49407).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detection", "grounding", "image_text"])
def test_every_part_runs(kind):
    for name, part in parts_of(kind).items():
        out = jax.jit(part.fn)(*step_parts.concrete(part, batch_of(kind)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), name
        if not part.renews and jax.tree.leaves(part.learned):
            shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
            assert shape(out[1]) == shape(part.learned)


def test_least_bytes_of_the_neck_by_hand():
    """Two images of 64×64: maps of 8², 4² and 2² with 16, 32 and 64 channels; five levels of 8."""
    laterals = [  # inputs, the level above among them, and outputs; floats of both images
        (2 * (64 * 16 + 16 * 8), 2 * 64 * 8, 16 * 8 + 8),
        (2 * (16 * 32 + 4 * 8), 2 * 16 * 8, 32 * 8 + 8),
        (2 * 4 * 64, 2 * 4 * 8, 64 * 8 + 8),
    ]
    convs = [(n, n, 9 * 8 * 8 + 8) for n in (2 * 64 * 8, 2 * 16 * 8, 2 * 4 * 8)]
    convs += [(2 * 4 * 8, 2 * 1 * 8, 9 * 8 * 8 + 8), (2 * 1 * 8, 2 * 1 * 8, 9 * 8 * 8 + 8)]
    # Forward: in, parameters, out. Backward: in, parameters, gradient in; two gradients out.
    expected = sum(4 * ((i + p + o) + (i + p + o) + (i + p)) for i, o, p in laterals + convs)
    assert parts_of("detection")["neck"].least_bytes == expected
    half = dataclasses.replace(tiny_model.CONFIG, dtype="bfloat16")
    parameters = 12 * sum(p for _, _, p in laterals + convs)
    found = least_bytes.Least(half, LOSS, (64, 64), 2, 8).neck()
    assert found - parameters == (expected - parameters) / 2  # parameters stay float32


def test_least_bytes_know_every_parameter():
    """Without images, only parameters remain: read twice, and their gradient written."""
    cfg = tiny_model.CONFIG
    least = least_bytes.Least(cfg, LOSS, (64, 64), 0, 0)
    found = parts_of("detection")
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    assert least.backbone() == 12 * count(found["backbone"].learned)
    assert least.neck() == 12 * count(found["neck"].learned[0])
    scales = 5  # of the levels' deltas: in no layer
    assert least.head() == 12 * (count(found["head"].learned[0]) - scales)
    assert least.deformable() == 12 * count(found["deformable sampling"].learned[0])
    # Of the embedding only the gradient is as large as the vocabulary.
    embedding = (cfg.text.vocab + cfg.text.context) * cfg.text.width
    assert least.text() == 12 * (count(found["text"].learned) - embedding) + 4 * embedding
    assert found["optimizer"].least_bytes == 40 * count(found["optimizer"].learned[0])


def test_steps_are_read():
    shapes = step_parts.parse_steps("detection:4x800x1344,image_text:64x320x320", 0)
    assert [(s.kind, s.images, s.canvas, s.concepts) for s in shapes] == [
        ("detection", 4, (800, 1344), 384),
        ("image_text", 64, (320, 320), 256),
    ]
    assert step_parts.parse_steps("grounding:1x64x32", 16)[0].concepts == 16
    for wrong in ("boxes:1x2x3", "detection:1x320", "detection:0x320x320", "detection", ""):
        with pytest.raises(UserError, match="--steps: .*KIND:IMAGESxHEIGHTxWIDTH"):
            step_parts.parse_steps(wrong, 0)


def test_groups_of_images_fit_the_batch():
    group = lambda images: (
        step_parts.loss_config(step_parts.Shape("image_text", images, (64, 64), 8)).proposals.group
    )
    assert (group(4), group(384), group(200)) == (4, 192, 200)


def test_turns_and_ratios():
    calls = []
    work = {(who, "step"): lambda who=who: calls.append(who) for who in ("ours", "PyTorch")}
    times = benchmark.in_turns(work, 3)
    assert calls == ["ours", "ours", "PyTorch", "PyTorch"] * 3
    assert times["ours", "step"].shape == (3, 2)
    times = {
        ("ours", "step"): np.array([[1.0, 2.0], [2.0, 2.0], [4.0, 2.0]]),
        ("PyTorch", "step"): np.array([[2.0, 3.0], [8.0, 3.0], [12.0, 5.0]]),
    }
    found = benchmark.figures(times, "step")
    assert found["seconds"] == 2 and found["torch_core_seconds"] == 3
    assert found["ours_is_faster_by"] == 3  # the median of 2, 4 and 3
    assert "torch_seconds" not in benchmark.figures(
        {("ours", "step"): times["ours", "step"]}, "step"
    )


def test_whose_word_on_memory_is_taken():
    compiled = types.SimpleNamespace(
        argument_size_in_bytes=10, temp_size_in_bytes=5, output_size_in_bytes=9,
        alias_size_in_bytes=7,
    )  # fmt: skip
    peak = lambda *args: tuple(benchmark.peak_memory(*args).values())
    assert peak(compiled, 100, 200) == (200, "device")
    assert peak(compiled, 200, 200) == (17, "compiler")  # an earlier step's peak
    assert peak(compiled, None, None) == (17, "compiler")
    assert peak(None, None, None)[1] == "process"


def row(kind="detection", compared=True):
    more = {"torch_seconds": 4.0, "torch_core_seconds": 5.0} if compared else {}
    more |= {"ours_is_faster_by": 2.0, "by_core_seconds": 2.5} if compared else {}
    times = {"seconds": 2.0, "core_seconds": 2.0} | more
    part = {"flops": 1e12, "least_bytes": 1e9, "share": 0.5, "of_ceiling": 0.25} | times
    part["ceiling_flops_per_second"] = 2e12
    whole = times | {
        "compile_seconds": 30.2, "peak_bytes": 2**30, "peak_from": "compiler", "mfu": 0.25,
        "images_per_second": 2.0, "ceiling_flops_per_second": 2e12,
    }  # fmt: skip
    return {
        "kind": kind, "images": 4, "canvas": [64, 96], "concepts": 8,
        "times": [{"what": "step"} | whole, {"what": "forward + backward"} | whole],
        "parts": [{"part": "backbone"} | part, {"part": "optimizer"} | part | {"flops": 0.0}],
    }  # fmt: skip


def test_table_and_picture(tmp_path):
    large = {"kind": "grounding", "images": 4, "canvas": [64, 96], "concepts": 8, "too_large": "no"}
    rows = [row(), large, row("image_text", compared=False)]
    text = benchmark.table(rows)
    first, *rest = text.split("\n\n")
    assert len({line.count("|") for line in first.splitlines()}) == 1
    name = "detection, 4 × 64×96, 8 concepts"
    assert f"| {name} | step | 2 | 2 | 2 | 25.0% | 30 | 1.00 | 4 | 2.00 × | 2.50 × |" in first
    assert "| grounding, 4 × 64×96, 8 concepts | does not fit |" in first
    assert "| backbone | 2 | 50% | 1 | 25% | 1 | 0.5 | 4 | 2.00 × | 2.50 × |" in rest[1]
    assert "| optimizer | 2 | 50% |  |  | 1 | 0.5 |" in rest[1]
    benchmark.draw(rows, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 5_000


def test_needs_nothing_that_a_gpu_box_may_lack():
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "clu", "ml_collections", "pycocotools", "orbax",
                                  "array_record", "tokenizers", "ftfy", "cv2", "torch", "spacy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import benchmark_train
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=tiny_run.environment())


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    """Only the step; compiling takes most of the time."""
    arguments = [f"--output={tmp_path}", "--steps=detection:2x64x64", "--concepts=8", "--rounds=2"]
    benchmark.run(arguments, tiny_model.CONFIG)
    found = json.loads((tmp_path / "train.json").read_text())
    (only,) = found["rows"]
    (step,) = only["times"]
    assert step["seconds"] > 0 and 0 < step["mfu"] < 1
    assert found["model"]["dtype"] == "float32" and found["platform"] == "cpu"
    assert (tmp_path / "train.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "train.png").exists()
    with pytest.raises(UserError, match="--rounds"):
        benchmark.run([*arguments, "--rounds=0"], tiny_model.CONFIG)
    with pytest.raises(UserError, match="--no_step"):
        benchmark.run([*arguments, "--no_step"], tiny_model.CONFIG)


# ---- The model in PyTorch is ours.

WIDER = dataclasses.replace(
    tiny_model.CONFIG,
    swin=dataclasses.replace(tiny_model.CONFIG.swin, depths=(2, 1, 1, 1), drop_path=0.0),
    head=dataclasses.replace(tiny_model.CONFIG.head, convs=2),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detection", "grounding", "image_text"])
def test_pytorch_s_loss_and_gradient_are_ours(kind):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from comparison import torch_detclip

    from detclipv2_jax.models import detclip
    from detclipv2_jax.models.parameters import parameter_paths
    from detclipv2_jax.training import accumulate
    from detclipv2_jax.weights import convert
    from detclipv2_jax.weights.swin import LAYOUTS

    batch = batch_of(kind, WIDER)
    theirs = torch_detclip.Trainer(
        WIDER, LOSS, OptimizerConfig(), batch, device="cpu", compiled=False
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            std = 0.3 if parameter.ndim > 1 else 0.1
            if "logit_" not in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))

    graphdef, abstract = detclip.abstract(WIDER)
    shapes = {name: x.shape for name, x in parameter_paths(abstract).items()}

    def ours(tensors):
        """Return their tensors by our paths."""
        found = {}
        for path, shape in shapes.items():
            if path.startswith("backbone/"):
                continue
            found[path] = renamed(tensors, path).reshape(shape)
        prefix = "backbone/"
        swin = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
        published = {
            k.removeprefix("backbone.swin.").removeprefix("backbone."): v
            for k, v in tensors.items()
            if k.startswith("backbone.")
        }
        converted, report = convert.convert(published, LAYOUTS, swin, "part", "PyTorch")
        assert not report.not_loaded
        return found | {prefix + k: v for k, v in converted.items()}

    numpy = lambda tensors: {k: v.detach().numpy() for k, v in tensors}
    paths = ours(numpy(theirs.model.named_parameters()))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    names = ["/".join(entry.key for entry in path) for path, _ in leaves]
    params = jax.tree.unflatten(structure, [jnp.asarray(paths[name]) for name in names])

    run = jax.jit(
        lambda params: accumulate.loss_and_gradient(params, batch, None, graphdef, LOSS, 1, None)
    )
    (loss, _), gradient = run(params)
    expected = theirs.objective(theirs.model, theirs.batch)
    theirs.forward_backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    grads = [
        (k, torch.zeros_like(p) if p.grad is None else p.grad)
        for k, p in theirs.model.named_parameters()
    ]
    by_path = ours(numpy(grads))
    taught = {"detection": "head/box/kernel", "image_text": "head/dcn/offset/kernel"}
    assert np.abs(by_path[taught.get(kind, "head/embed/kernel")]).max() > 0
    for name, value in zip(names, jax.tree.leaves(gradient)):
        scale = max(np.abs(by_path[name]).max(), 1e-5)
        np.testing.assert_allclose(value, by_path[name], atol=2e-3 * scale, err_msg=name)


def renamed(tensors, path):
    """Return their tensor of our neck, head or text parameter, in our layout."""
    name = path.replace("/", ".")
    for old, new in (
        (".kernel", ".weight"), (".scale", ".weight"), ("attn.", ""), ("mlp.", ""),
        ("head.dcn.weight", "head.dcn.kernel"), ("head.weights", "head.scales"),
        ("token_embedding", "token_embedding.weight"),
    ):  # fmt: skip
        name = name.replace(old, new)
    if "_convs." in name:
        name = name.replace(".conv.", ".0.").replace(".norm.", ".1.")
    value = tensors[name]
    if path.endswith("/kernel") and path != "head/dcn/kernel":
        if value.ndim == 4:
            return value.transpose(2, 3, 1, 0)
        return value.T
    return value
