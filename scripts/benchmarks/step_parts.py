"""The parts of one training step as separate functions, to time them or to compile them ahead.

    found = parts(sizes.SWIN_T, LossConfig(), OptimizerConfig(), "detection", (800, 1344), 4, 384)
    jax.jit(found["neck"].fn).lower(*found["neck"].inputs).compile()        # from shapes alone
    jax.jit(found["neck"].fn)(*concrete(found["neck"], batch))              # or run

The first input of a part is what it is differentiated by: parameters and the activations of the
part before. A part returns its outputs and the gradient of all of these. The cotangents are random
and an input, too, so that the compiler cannot fold them. The assignment and the choice of regions
have no gradient.

`scripts/benchmarks/least_bytes.py` describes what `least_bytes` counts.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree
from least_bytes import Least, size_of

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip, flops, sizes
from detclipv2_jax.models.atss_head import ATSSHead
from detclipv2_jax.models.detclip import DetCLIP, DetCLIPConfig, l2_normalize, normalize_images
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.training import objective
from detclipv2_jax.training import optimizer as optimizer_lib
from detclipv2_jax.training.objective import LossConfig, ProposalConfig
from detclipv2_jax.training.optimizer import OptimizerConfig

_NOISE = 0.05  # standard deviation of parameters and activations: no overflow, no zeros
# Entry of `flops.step` -> the part it belongs to.
FLOPS_OF = {
    "backbone": "backbone",
    "neck": "neck",
    "head": "head",
    "deformable": "deformable sampling",
    "text": "text",
    "choice of regions": "choice of regions",
    "contrastive loss": "losses",
    "alignment loss": "losses",
}
MODELS = {"swin_t": sizes.SWIN_T, "swin_l": sizes.SWIN_L, "nano": sizes.NANO}
# Default of --concepts, from configs/pretrain.py: rows of the concept table; for image_text, rows
# per image.
CONCEPTS = {"detection": 384, "grounding": 2048, "image_text": 4}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step to measure."""

    kind: str
    images: int
    canvas: tuple[int, int]  # (height, width)
    concepts: int

    def __str__(self) -> str:
        height, width = self.canvas
        return f"{self.kind}, {self.images} × {height}×{width}, {self.concepts} concepts"


def parse_steps(text: str, concepts: int) -> list[Shape]:
    """Parse --steps.

    Args:
      text: KIND:IMAGESxHEIGHTxWIDTH, separated by commas.
      concepts: rows of the concept table; 0: the default of the kind.

    Raises:
      UserError: an entry is not valid.
    """
    found = []
    for entry in text.split(","):
        kind, _, numbers = entry.strip().partition(":")
        parts = numbers.split("x")
        is_step = len(parts) == 3 and all(part.isdigit() and int(part) for part in parts)
        if kind not in CONCEPTS or not is_step:
            raise UserError(
                f"--steps: {entry!r} is not a step. Write KIND:IMAGESxHEIGHTxWIDTH, for example "
                f"detection:4x800x1344. Kinds are {', '.join(CONCEPTS)}."
            )
        images, height, width = map(int, parts)
        rows = concepts or CONCEPTS[kind] * (images if kind == "image_text" else 1)
        found.append(Shape(kind, images, (height, width), rows))
    return found


def loss_config(shape: Shape) -> LossConfig:
    """Return the recipe's losses; images that do not fill whole groups of 192 are one group."""
    group = ProposalConfig.group
    if shape.images % group:
        group = shape.images
    return LossConfig(proposals=ProposalConfig(group=group))


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
      fn: a function of `learned` and `fixed` that returns arrays.
      learned: abstract arrays to differentiate by; for the optimizer, the arrays that it updates.
      fixed: name -> abstract arrays that are not differentiated by.
      from_batch: returns the entries of `fixed` that come from a batch; the others are noise.
      least_bytes: the bytes that its layers must move.
      flops: of matrix products, convolutions and sampling, forward and backward.
      renews: whether `fn` returns new values of `learned`, so that the arrays may be donated.
    """

    fn: Callable[[PyTree, dict[str, Any]], PyTree]
    learned: PyTree
    fixed: dict[str, Any]
    from_batch: Callable[[Batch], dict[str, Any]]
    least_bytes: float
    flops: float = 0.0
    renews: bool = False

    @property
    def inputs(self) -> tuple[PyTree, dict[str, Any]]:
        """Abstract arguments of `fn`."""
        return self.learned, self.fixed

    @property
    def donate(self) -> tuple[int, ...]:
        """The `donate_argnums` for `jax.jit`."""
        return (0,) if self.renews else ()


def parts(
    model: DetCLIPConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    kind: str,
    shape: tuple[int, int],
    images: int,
    concepts: int,
    *,
    boxes: int = 100,
    texts: int = 8,
) -> dict[str, Part]:
    """Return the parts of a step of one kind on one device by name, in the order of execution.

    Args:
        model: its sizes, activation dtype and rematerialization.
        loss: settings of the losses; for image_text, `proposals.group` must divide `images`.
        optimizer: settings of the update.
        kind: detection, grounding or image_text.
        shape: (height, width) of the canvas, pixels.
        images: number of images on the device.
        concepts: rows of the concept table.
        boxes: slots for boxes per image; unused for image_text.
        texts: concepts per image; image_text only.
    """
    batch = abstract_batch(model, kind, shape, images, concepts, boxes=boxes, texts=texts)
    bytes_of = Least(model, loss, shape, images, concepts)
    found = _encoders(model, batch, bytes_of)
    regions = _regions(model, images, bytes_of.anchors)
    if kind == "image_text":
        found |= _image_text(model, loss, batch, regions, bytes_of)
    else:
        found |= _dense(model, loss, kind, batch, regions, bytes_of)
    found["optimizer"] = _optimizer(model, optimizer)
    counted = flops.step(
        model, kind, shape, images, concepts,
        proposals=loss.proposals.k, group=loss.proposals.group,
    )  # fmt: skip
    for entry, value in counted.items():
        name = FLOPS_OF[entry]
        found[name] = dataclasses.replace(found[name], flops=found[name].flops + value)
    return found


def concrete(part: Part, batch: Batch, seed: int = 0) -> tuple[PyTree, dict[str, Any]]:
    """Return arguments to run a part: noise, and what comes from `batch`."""
    rng = np.random.default_rng(seed)

    def noise(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        drawn = rng.standard_normal(leaf.shape, np.float32) * np.float32(_NOISE)
        return jnp.asarray(drawn, leaf.dtype)

    learned = jax.tree.map(noise, part.learned)
    if part.renews:
        learned = jax.tree.map(jnp.abs, learned)  # a mean of squares is not negative
    given = jax.jit(part.from_batch)(batch)
    rest = {name: jax.tree.map(noise, v) for name, v in part.fixed.items() if name not in given}
    return learned, rest | given


def abstract_batch(
    model: DetCLIPConfig,
    kind: str,
    shape: tuple[int, int],
    images: int,
    concepts: int,
    *,
    boxes: int = 100,
    texts: int = 8,
) -> Batch:
    """Return the shapes and types of one device's batch."""
    array = jax.ShapeDtypeStruct
    boxes, texts = (0, texts) if kind == "image_text" else (boxes, 0)
    return Batch(
        images=array((images, *shape, 3), np.uint8),
        sizes=array((images, 2), np.int32),
        boxes=array((images, boxes, 4), np.float32),
        labels=array((images, boxes, 1), np.int32),
        scored=array((images, concepts if boxes else 0), np.bool_),
        texts=array((images, texts), np.int32),
        tokens=array((concepts, model.text.context), np.int32),
        token_mask=array((concepts,), np.bool_),
        kind=kind,
    )


def random_batch(abstract: Batch, vocab: int, seed: int = 0) -> Batch:
    """Return a batch of noise images with plausible boxes, labels and tokens.

    Sides of boxes are 1/50 to 1/2 of the canvas's; half of the slots are empty. Every concept has
    three to eight tokens; every image has as many texts as fit.
    """
    rng = np.random.default_rng(seed)
    images, height, width, _ = abstract.images.shape
    slots, concepts = abstract.boxes.shape[1], len(abstract.tokens)
    canvas = np.float32([width, height])
    sides = canvas * np.exp(rng.uniform(math.log(0.02), math.log(0.5), (images, slots, 2)))
    corners = rng.uniform(0, 1, (images, slots, 2)) * (canvas - sides)
    there = np.arange(slots) < (slots + 1) // 2
    boxes = np.concatenate([corners, corners + sides], axis=-1) * there[:, None]
    tokens = np.zeros(abstract.tokens.shape, np.int32)
    for row in tokens:
        length = min(int(rng.integers(3, 9)), len(row) - 2)
        row[: length + 2] = [vocab - 2, *rng.integers(1, vocab - 2, length), vocab - 1]
    labels = np.where(there, rng.integers(0, concepts, (images, slots)), -1).astype(np.int32)
    return Batch(
        images=rng.integers(0, 256, abstract.images.shape, dtype=np.uint8),
        sizes=np.tile(np.int32([height, width]), (images, 1)),
        boxes=boxes.astype(np.float32),
        labels=labels[..., None],
        scored=np.ones(abstract.scored.shape, bool),
        texts=rng.integers(0, concepts, abstract.texts.shape).astype(np.int32),
        tokens=tokens,
        token_mask=np.ones(concepts, bool),
        kind=abstract.kind,
    )


# ---- The parts.


def _pulled(forward: Callable[[PyTree, dict[str, Any]], PyTree]):
    """Return a function of `forward`'s outputs and their gradient by `fixed["cotangent"]`."""

    def run(learned: PyTree, fixed: dict[str, Any]) -> tuple[PyTree, PyTree]:
        outputs, pull = jax.vjp(lambda learned: forward(learned, fixed), learned)
        return outputs, pull(fixed["cotangent"])[0]

    return run


def _learning(
    forward: Callable[[PyTree, dict[str, Any]], PyTree],
    learned: PyTree,
    batch: Batch,
    from_batch: Callable[[Batch], dict[str, Any]] = lambda batch: {},
    noise: dict[str, Any] | None = None,
    *,
    least_bytes: float,
) -> Part:
    """Return a part with a gradient; its cotangents have the shapes of its outputs."""
    fixed = (noise or {}) | jax.eval_shape(from_batch, batch)
    cotangent = jax.eval_shape(forward, learned, fixed)
    return Part(
        _pulled(forward), learned, fixed | {"cotangent": cotangent}, from_batch, least_bytes
    )


def _module(build: Callable[[], nnx.Module]) -> tuple[Callable[[PyTree], nnx.Module], PyTree]:
    """Return a function from parameters to the module, and the abstract parameters."""
    graphdef, state = jax.eval_shape(lambda: nnx.split(build()))
    return functools.partial(nnx.merge, graphdef), state


def _encoders(model: DetCLIPConfig, batch: Batch, bytes_of: Least) -> dict[str, Part]:
    """Return backbone, neck, head, deformable sampling and text."""
    whole = lambda: DetCLIP(model, rngs=Draws())
    array, images = jax.ShapeDtypeStruct, len(batch.images)
    unit = l2_normalize if model.similarity == "cosine" else lambda x: x

    backbone, swin = _module(lambda: whole().backbone)
    run_backbone = lambda learned, fixed: backbone(learned)(
        normalize_images(fixed["images"]), fixed.get("drop_path_factors")
    )
    drops = {"drop_path_factors": array((sum(model.swin.depths), 2, images), jnp.float32)}
    found = {
        "backbone": _learning(
            run_backbone, swin, batch, lambda batch: {"images": batch.images},
            drops if model.swin.drop_path else {}, least_bytes=bytes_of.backbone(),
        )
    }  # fmt: skip
    maps = found["backbone"].fixed["cotangent"]

    neck, fpn = _module(lambda: whole().neck)
    found["neck"] = _learning(
        lambda learned, _: neck(learned[0])(learned[1]), (fpn, maps), batch,
        least_bytes=bytes_of.neck(),
    )  # fmt: skip
    levels = found["neck"].fixed["cotangent"]

    # Without the deformable convolution; the convolution after it then reads the neck's map.
    plain = dataclasses.replace(model.head, deformable=False)
    dtype = levels[0].dtype
    options = {"dtype": dtype, "remat": model.remat, "kernels": model.kernels}
    head, atss = _module(
        lambda: ATSSHead(model.neck_channels, len(levels), plain, **options, rngs=Draws())
    )

    def run_head(learned, _):
        outputs = head(learned[0])(learned[1])
        return dataclasses.replace(outputs, embeddings=unit(outputs.embeddings))

    found["head"] = _learning(run_head, (atss, levels), batch, least_bytes=bytes_of.head())

    if model.head.deformable:
        sample, dcn = _module(lambda: whole().head.dcn)
        packed = PackedLevels(tuple(x.shape[1:3] for x in levels))
        map_of = lambda width: array((images, *packed.shape, width), dtype)

        def deform(learned, _):
            module, x, regression = sample(learned[0]), *learned[1:]
            return module(x, module.offset(regression), packed)

        found["deformable sampling"] = _learning(
            deform, (dcn, map_of(model.neck_channels), map_of(model.head.channels)), batch,
            least_bytes=bytes_of.deformable(),
        )  # fmt: skip

    text, tower = _module(lambda: whole().text)
    found["text"] = _learning(
        lambda learned, fixed: unit(text(learned)(fixed["tokens"])), tower, batch,
        lambda batch: {"tokens": batch.tokens}, least_bytes=bytes_of.text(),
    )  # fmt: skip
    return found


def _regions(model: DetCLIPConfig, images: int, anchors: int) -> detclip.RegionOutputs:
    array = jax.ShapeDtypeStruct
    return detclip.RegionOutputs(
        embeddings=array((images, anchors, model.head.embed_dim), jnp.float32),
        deltas=array((images, anchors, 4), jnp.float32),
        centerness=array((images, anchors), jnp.float32),
    )


def _similarity(model: DetCLIPConfig, batch: Batch, regions: Any) -> dict[str, Any]:
    """Return what the losses are differentiated by."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    concepts = jax.ShapeDtypeStruct((len(batch.tokens), model.text.embed_dim), jnp.float32)
    return {"regions": regions, "concepts": concepts, "scale": scalar, "bias": scalar}


def _stand_in(model: DetCLIPConfig, learned: dict[str, Any]) -> Any:
    """Return an object with the attributes of a model that the losses use."""
    scale = jnp.exp(learned["scale"])
    return types.SimpleNamespace(cfg=model, logit_bias=learned["bias"], scale=lambda: scale)


def _dense(
    model: DetCLIPConfig,
    loss: LossConfig,
    kind: str,
    batch: Batch,
    regions: Any,
    bytes_of: Least,
) -> dict[str, Part]:
    """Return assignment and losses of detection and grounding."""
    canvas, with_boxes = batch.images.shape[1:3], objective.has_box_losses(kind, loss)
    assign = functools.partial(
        objective.assign_targets, canvas=canvas, grid=model.anchors, candidates=loss.candidates
    )

    def truth(batch: Batch) -> dict[str, Any]:
        return {"sizes": batch.sizes, "boxes": batch.boxes, "labels": batch.labels}

    def targets(batch: Batch) -> dict[str, Any]:
        found = assign(**truth(batch))
        divisors = objective.normalizers(found)
        masks = {"token_mask": batch.token_mask, "scored": batch.scored}
        return {"targets": found, "divisors": divisors, **masks}

    def losses(learned, fixed):
        stand_in = _stand_in(model, learned)
        total, _ = objective.loss_of_targets(
            stand_in, learned["regions"], stand_in.scale() * learned["concepts"],
            fixed["token_mask"], fixed["scored"], fixed["targets"], fixed["divisors"], canvas, loss,
            with_boxes,
        )  # fmt: skip
        return total

    given = jax.eval_shape(truth, batch)
    assigned = jax.eval_shape(assign, **given)
    return {
        "assignment": Part(
            lambda _, fixed: assign(**fixed), (), given, truth,
            least_bytes=size_of((given, assigned)),
        ),
        "losses": _learning(
            losses, _similarity(model, batch, regions), batch, targets,
            least_bytes=bytes_of.dense_losses(with_boxes),
        ),
    }  # fmt: skip


def _image_text(
    model: DetCLIPConfig, loss: LossConfig, batch: Batch, regions: Any, bytes_of: Least
) -> dict[str, Part]:
    """Return the choice of regions and the contrastive loss."""
    canvas = batch.images.shape[1:3]

    def given(batch: Batch) -> dict[str, Any]:
        return {"pools": objective.concept_pools(batch, loss), "sizes": batch.sizes}

    def choose(_, fixed):
        return objective.select_regions(
            _stand_in(model, fixed), fixed["regions"], fixed["concepts"], fixed["pools"],
            fixed["sizes"], canvas, loss.proposals,
        )  # fmt: skip

    def contrast(learned, fixed):
        features = objective.selected_embeddings(learned["regions"], fixed["chosen"])
        total, _ = objective.contrastive_loss(
            jnp.exp(learned["scale"]), features, fixed["chosen"], learned["concepts"],
            fixed["texts"], loss,
        )  # fmt: skip
        return total

    def chosen(batch: Batch) -> dict[str, Any]:
        """Choose every second region; the choice does not change the time of the loss."""
        images, anchors = regions.centerness.shape
        count = min(loss.proposals.k, anchors)
        places = (2 * jnp.arange(count, dtype=jnp.int32)) % anchors
        wide = lambda x: jnp.broadcast_to(x, (images, loss.proposals.k))
        places = jnp.pad(places, (0, loss.proposals.k - count))
        there = jnp.arange(loss.proposals.k) < count
        areas = 1.0 + places.astype(jnp.float32)
        selection = objective.Selection(wide(places), wide(there), wide(areas))
        return {"chosen": selection, "texts": batch.texts}

    noise = _similarity(model, batch, regions)
    fixed = noise | jax.eval_shape(given, batch)
    return {
        "choice of regions": Part(
            choose, (), fixed, given, least_bytes=bytes_of.choice(jax.eval_shape(choose, (), fixed))
        ),
        "losses": _learning(
            contrast, {k: v for k, v in noise.items() if k != "bias"}, batch, chosen,
            least_bytes=bytes_of.contrastive(batch.texts.shape[1]),
        ),
    }  # fmt: skip


def _optimizer(model: DetCLIPConfig, config: OptimizerConfig) -> Part:
    """Return the gradient norm and AdamW: updates (parameters, their average, moments)."""
    _, params = detclip.abstract(model)
    rule = optimizer_lib.create(config, params, 1000)

    def update(learned, fixed):
        gradients = fixed["gradients"]
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(norm)
        return rule.update(*learned, gradients, norm, fixed["step"], good)

    learned = optimizer_lib.Updated(params, params, jax.eval_shape(rule.init, params))
    fixed = {"gradients": params, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    # Reads the gradient for its norm; then reads five arrays and writes four.
    return Part(
        update, learned, fixed, lambda batch: {}, least_bytes=10 * size_of(params), renews=True
    )
