"""Loss and gradient of a global batch, at once or in micro-batches; both agree to float32 rounding.

With micro-batches, only the activations of one micro-batch are in memory. Each device splits its
own images, so nothing but the final sums travels between devices. Concepts are encoded once for all
micro-batches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip
from detclipv2_jax.training import encoding, objective
from detclipv2_jax.training.objective import Loss, LossConfig


class LossAndGradient(NamedTuple):
    """The loss of a global batch, and its gradient by the parameters."""

    loss: Loss
    gradient: PyTree


def check(batch_size: int, devices: int, micro_batches: int, kind: str) -> None:
    """Raise `UserError` unless a global batch can be split into devices × micro-batches."""
    if micro_batches < 1 or batch_size % (devices * micro_batches):
        raise UserError(
            f"config.data.{kind}.batch_size is {batch_size}, which is not a multiple of {devices} "
            f"device(s) × config.data.{kind}.micro_batches {micro_batches}. Choose a multiple, or "
            "fewer micro-batches."
        )


def loss_and_gradient(
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray | None,
    graphdef: Any,
    config: LossConfig,
    micro_batches: int,
    replicated: NamedSharding | None,
) -> LossAndGradient:
    """Return the loss of a global batch and its gradient by the parameters.

    Args:
      params: the parameters, with any sharding.
      batch: one global batch; `check` says which sizes can be split.
      key: random key of the drop path, drawn for the whole batch, so that the result does not
        depend on `micro_batches`; None for no drop path.
      graphdef: of the model.
      config: of the losses.
      micro_batches: into how many micro-batches each device splits its images. Activations take
        that many times less memory.
      replicated: sharding of an array that every device holds; None on one device.
    """

    def replicated_model(params: PyTree) -> detclip.DetCLIP:
        if replicated is not None:  # else the compiler splits activations like the parameters
            params = jax.lax.with_sharding_constraint(params, replicated)
        return detclip.build(graphdef, params)

    if micro_batches == 1:
        loss_fn = objective.loss_function(batch.kind)
        run = lambda params: loss_fn(replicated_model(params), batch, config, key, replicated)
        (total, terms), gradient = jax.value_and_grad(run, has_aux=True)(params)
        return LossAndGradient(Loss(total, terms), gradient)

    # The gradient reaches the text tower through the concepts: d loss/d concepts is summed over all
    # micro-batches, then goes through the tower once.
    concepts, concepts_vjp = jax.vjp(
        lambda params: encoding.encode_concepts(replicated_model(params), batch.tokens, replicated),
        params,
    )
    factors = replicated_model(params).backbone.draw_drop_path(key, len(batch.images))
    by_image = None if factors is None else jnp.moveaxis(factors, -1, 0)
    images = _Images(batch.images, batch.sizes, by_image)
    run = _Run(graphdef, config, micro_batches, None if replicated is None else replicated.mesh)
    of_texts = {"image_text": _image_text, "classification": _classification}
    accumulated = of_texts.get(batch.kind, _dense)(run, params, concepts, images, batch)
    gradient = jax.tree.map(
        jnp.add, accumulated.gradient, concepts_vjp(accumulated.concepts_gradient)[0]
    )
    return LossAndGradient(accumulated.loss, gradient)


class _Images(NamedTuple):
    """Inputs of the image tower, with the images along the first axis."""

    pixels: UInt8[Array, "B H W 3"]
    sizes: Int[Array, "B 2"]
    drop_path_factors: Float[Array, "B N 2"] | None

    def encode(self, model: detclip.DetCLIP) -> detclip.RegionOutputs:
        factors = self.drop_path_factors
        return model.encode_image(
            self.pixels,
            None if factors is None else jnp.moveaxis(factors, 0, -1),
            self.sizes,
            training=True,
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    """Settings that are the same for all micro-batches, and static for the compiler."""

    graphdef: Any
    config: LossConfig
    micro_batches: int
    mesh: Mesh | AbstractMesh | None

    def build(self, params: PyTree) -> detclip.DetCLIP:
        return detclip.build(self.graphdef, params)


class _Accumulated(NamedTuple):
    """Loss of a batch, and its gradient with the concepts taken as given."""

    loss: Loss
    gradient: PyTree  # by the parameters, not through the concepts
    concepts_gradient: Float[Array, "M D"]


# ---- Detection and grounding: one pass


class _Annotations(NamedTuple):
    """Inputs of the assignment."""

    sizes: Int[Array, "B 2"]
    boxes: Float[Array, "B N 4"]
    labels: Int[Array, "B N L"]


class _AssignedImages(NamedTuple):
    images: _Images
    scored: Bool[Array, "B M"]
    targets: objective.Targets


class _Fixed(NamedTuple):
    """Inputs of the dense loss that are the same for all micro-batches, without gradient."""

    divisors: objective.Normalizers
    token_mask: Bool[Array, " M"]


def _dense(
    run: _Run, params: PyTree, concepts: Float[Array, "M D"], images: _Images, batch: Batch
) -> _Accumulated:
    """Return the dense loss of a batch, a sum over its images.

        loss = Σ_micro-batches loss(micro-batch) / normalizers(whole batch)

    The normalizers depend on the assignment alone, so all images are assigned first.
    """
    canvas, grid = batch.canvas, run.build(params).cfg.anchors
    with_boxes = objective.has_box_losses(batch.kind, run.config)

    def assign(_: PyTree, annotations: _Annotations) -> objective.Targets:
        return objective.assign_targets(*annotations, canvas, grid, run.config.candidates)

    annotations = _Annotations(batch.sizes, batch.boxes, batch.labels)
    targets = map_micro_batches(assign, (), annotations, run.micro_batches, run.mesh)
    divisors = objective.normalizers(targets)

    def loss_fn(learned: PyTree, fixed: _Fixed, piece: _AssignedImages) -> Loss:
        params, concepts = learned
        model = run.build(params)
        return objective.loss_of_targets(
            model, piece.images.encode(model), model.scale() * concepts, fixed.token_mask,
            piece.scored, piece.targets, fixed.divisors, canvas, run.config, with_boxes,
        )  # fmt: skip

    loss, (gradient, concepts_gradient) = sum_micro_batches(
        loss_fn, (params, concepts), _Fixed(divisors, batch.token_mask),
        _AssignedImages(images, batch.scored, targets), run.micro_batches, run.mesh,
    )  # fmt: skip
    loss = Loss(loss.total, loss.terms | {"positives": divisors.positives})
    return _Accumulated(loss, gradient, concepts_gradient)


# ---- Image-text pairs: two passes


class _PooledImages(NamedTuple):
    images: _Images
    sizes: Int[Array, "B 2"]
    pools: Int[Array, "G N"]


class _SelectedRegions(NamedTuple):
    features: Float[Array, "B P D"]
    selection: objective.Selection


class _ImagesWithGradient(NamedTuple):
    images: _Images
    selection: objective.Selection
    features_gradient: Float[Array, "B P D"]


def _image_text(
    run: _Run, params: PyTree, concepts: Float[Array, "M D"], images: _Images, batch: Batch
) -> _Accumulated:
    """Return the image-text loss of a batch, in which every text is compared with every image.

    The loss is not a sum over images, so the chain rule is applied in two passes, as in GradCache
    (Gao et al., RepL4NLP 2021). With F(θ), the features of the selected regions of all images:

        1. F, without gradient, micro-batch by micro-batch
           loss(F, scale, concepts) and its gradients, for the whole batch at once
        2. Σ_micro-batches ∂/∂θ ⟨F(θ), ∂loss/∂F⟩, micro-batch by micro-batch
    """

    def select(shared: PyTree, piece: _PooledImages) -> _SelectedRegions:
        params, concepts = shared
        model = run.build(params)
        regions = piece.images.encode(model)
        selection = objective.select_regions(
            model, regions, concepts, piece.pools, piece.sizes, batch.canvas, run.config.proposals
        )
        return _SelectedRegions(objective.selected_embeddings(regions, selection), selection)

    pooled = _PooledImages(images, batch.sizes, _pools_within_micro_batches(run, batch))
    features, selection = map_micro_batches(
        select, (params, concepts), pooled, run.micro_batches, run.mesh
    )

    def loss_fn(params: PyTree, features: Array, concepts: Array) -> Loss:
        scale = run.build(params).scale()
        return objective.contrastive_loss(
            scale, features, selection, concepts, batch.texts, run.config
        )

    (total, terms), (scale_gradient, features_gradient, concepts_gradient) = jax.value_and_grad(
        loss_fn, argnums=(0, 1, 2), has_aux=True
    )(params, features, concepts)

    def inner_product(params: PyTree, _: PyTree, piece: _ImagesWithGradient) -> Loss:
        regions = piece.images.encode(run.build(params))
        features = objective.selected_embeddings(regions, piece.selection)
        return Loss(jnp.sum(features * piece.features_gradient), dict(regions.statistics))

    second, gradient = sum_micro_batches(
        inner_product, params, (), _ImagesWithGradient(images, selection, features_gradient),
        run.micro_batches, run.mesh,
    )  # fmt: skip
    gradient = jax.tree.map(jnp.add, gradient, scale_gradient)
    return _Accumulated(Loss(total, terms | second.terms), gradient, concepts_gradient)


def _pools_within_micro_batches(run: _Run, batch: Batch) -> Int[Array, "G N"]:
    """Return concept pools of groups of images so small that no group spans two micro-batches.

    A group of the recipe may span two. It is divided into equal runs of consecutive images, each
    with the pool of the group, whose length divides both the group and the micro-batch.
    """
    pools = objective.concept_pools(batch, run.config)
    per_group = len(batch.images) // len(pools)
    devices = 1 if run.mesh is None else run.mesh.size
    per_micro_batch = len(batch.images) // (run.micro_batches * devices)
    return jnp.repeat(pools, per_group // math.gcd(per_group, per_micro_batch), axis=0)


# ---- Images with a class: one pass


class _ClassImages(NamedTuple):
    images: _Images
    sizes: Int[Array, "B 2"]
    texts: Int[Array, "B 1"]
    pools: Int[Array, "G N"]


class _ClassNames(NamedTuple):
    token_mask: Bool[Array, " M"]
    images: Float[Array, ""]


def _classification(
    run: _Run, params: PyTree, concepts: Float[Array, "M D"], images: _Images, batch: Batch
) -> _Accumulated:
    """Return the classification loss of a batch, a sum over its images."""

    def loss_fn(learned: PyTree, fixed: _ClassNames, piece: _ClassImages) -> Loss:
        params, concepts = learned
        model = run.build(params)
        return objective.loss_of_classes(
            model, piece.images.encode(model), concepts, fixed.token_mask, piece.pools, piece.sizes,
            piece.texts, fixed.images, batch.canvas, run.config,
        )  # fmt: skip

    pools = _pools_within_micro_batches(run, batch)
    loss, (gradient, concepts_gradient) = sum_micro_batches(
        loss_fn, (params, concepts),
        _ClassNames(batch.token_mask, objective.named_images(batch)),
        _ClassImages(images, batch.sizes, batch.texts, pools), run.micro_batches, run.mesh,
    )  # fmt: skip
    return _Accumulated(loss, gradient, concepts_gradient)


# ---- Loops over micro-batches


def map_micro_batches(
    fn: Callable[[PyTree, PyTree], PyTree],
    shared: PyTree,
    images: PyTree,
    micro_batches: int,
    mesh: Mesh | AbstractMesh | None,
) -> PyTree:
    """Return `fn(shared, micro_batch)` of all micro-batches, concatenated.

    Args:
      fn: returns arrays whose first axis is that of the micro-batch.
      shared: further input, the same for all micro-batches; every device holds all of it.
      images: arrays whose first axis is split over all devices, and there into micro-batches.
      micro_batches: their number on each device; they are computed one after another.
      mesh: the devices; None for one.
    """

    def run(shared: PyTree, images: PyTree) -> PyTree:
        outputs = jax.lax.map(lambda piece: fn(shared, piece), _split(images, micro_batches))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    if mesh is None:
        return run(shared, images)
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    return _on_each_device(run, mesh, (everywhere, split), split)(shared, images)


def sum_micro_batches(
    fn: Callable[[PyTree, PyTree, PyTree], Loss],
    learned: PyTree,
    fixed: PyTree,
    images: PyTree,
    micro_batches: int,
    mesh: Mesh | AbstractMesh | None,
) -> LossAndGradient:
    """Return the sum of `fn(learned, fixed, micro_batch)` over all micro-batches and devices.

    Args:
      fn: the loss of a micro-batch.
      learned: the variables of the gradient; every device holds all of them.
      fixed: further input without gradient; every device holds all of it.
      images: as for `map_micro_batches`, and so are the other arguments.
    """

    def run(learned: PyTree, fixed: PyTree, images: PyTree) -> LossAndGradient:
        def add(total: LossAndGradient, piece: PyTree) -> tuple[LossAndGradient, None]:
            (loss, terms), gradient = jax.value_and_grad(fn, has_aux=True)(learned, fixed, piece)
            found = LossAndGradient(Loss(loss, terms), gradient)
            return jax.tree.map(jnp.add, total, found), None

        pieces = _split(images, micro_batches)
        loss = jax.eval_shape(fn, learned, fixed, jax.tree.map(lambda x: x[0], pieces))
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), LossAndGradient(Loss(*loss), learned)
        )
        total, _ = jax.lax.scan(add, zero, pieces)
        return total if mesh is None else jax.lax.psum(total, mesh.axis_names)

    if mesh is None:
        return run(learned, fixed, images)
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = (everywhere, everywhere, split)
    return _on_each_device(run, mesh, specs, everywhere)(learned, fixed, images)


def _split(images: PyTree, micro_batches: int) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), images)


def _on_each_device(
    run: Callable[..., Any], mesh: Mesh | AbstractMesh, inputs: Any, outputs: Any
) -> Any:
    # check_vma: until `sum_micro_batches` adds them up, gradients differ between devices although
    # the parameters do not.
    return jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
