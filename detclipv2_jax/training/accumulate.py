"""Loss and gradient of a global batch, whole or part by part, equal to float32 rounding.

In parts, one part's activations are held at a time. Each device cuts its own share of the images,
so nothing travels between devices but the sums at the end. Concepts are encoded once for all parts.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip
from detclipv2_jax.training import objective
from detclipv2_jax.training.objective import LossConfig, Losses

Value = tuple[Float[Array, ""], Losses]  # a loss and its parts


def check(batch_size: int, devices: int, count: int, kind: str) -> None:
    """UserError if a global batch cannot be split over the devices and cut into parts there."""
    if count < 1 or batch_size % (devices * count):
        raise UserError(
            f"config.data.{kind}.batch_size is {batch_size}, which {devices} device(s) × "
            f"config.data.{kind}.accumulate {count} do not divide: choose a multiple of their "
            "product, or fewer parts."
        )


def loss_and_gradient(
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray | None,
    graphdef: Any,
    config: LossConfig,
    count: int,
    replicated: NamedSharding | None,
) -> tuple[Value, PyTree]:
    """((loss, its parts), gradient by the parameters), the images in `count` parts a device.

    Args:
      params: in any layout.
      batch: one global batch; `check` says which sizes can be cut.
      key: draws the drop path, for the whole batch at once: the same with any `count`; None: none.
      graphdef: the model's.
      config: the losses'.
      count: 1 takes the batch whole, 2 or more hold so many times fewer activations.
      replicated: how all devices hold an array whole; None on one device.
    """

    def whole(params: PyTree) -> detclip.DetCLIP:
        if replicated is not None:  # else the compiler would split activations as parameters are
            params = jax.lax.with_sharding_constraint(params, replicated)
        return detclip.build(graphdef, params)

    if count == 1:
        loss_of = objective.losses_of(batch.kind)
        run = lambda params: loss_of(whole(params), batch, config, key, replicated)  # noqa: E731
        return jax.value_and_grad(run, has_aux=True)(params)

    concepts, by_concepts = jax.vjp(
        lambda params: objective.encode_concepts(whole(params), batch.tokens, replicated), params
    )
    drop_path_factors = whole(params).backbone.draw_drop_path(key, len(batch.images))
    images = {"pixels": batch.images, "sizes": batch.sizes}
    if drop_path_factors is not None:
        images["drop_path_factors"] = jnp.moveaxis(drop_path_factors, -1, 0)
    mesh = None if replicated is None else replicated.mesh
    in_parts = _image_text if batch.kind == "image_text" else _dense
    value, gradient, slope = in_parts(
        params, concepts, images, batch, lambda params: detclip.build(graphdef, params),
        config, count, mesh,
    )  # fmt: skip
    return value, jax.tree.map(jnp.add, gradient, by_concepts(slope)[0])


def _dense(
    params: PyTree,
    concepts: Float[Array, "M D"],
    images: dict[str, Array],
    batch: Batch,
    build: Callable[[PyTree], detclip.DetCLIP],
    config: LossConfig,
    count: int,
    mesh: Mesh | None,
) -> tuple[Value, PyTree, Float[Array, "M D"]]:
    """A sum over images, once it is known what the whole batch's is divided by: one pass."""
    canvas, grid = batch.images.shape[1:3], build(params).cfg.anchors
    with_boxes = objective.has_box_losses(batch.kind, config)

    def assign(_: PyTree, part: dict[str, Array]) -> objective.Targets:
        return objective.dense_targets(
            part["sizes"], part["boxes"], part["labels"], canvas, grid, config.candidates
        )

    marks = {"sizes": batch.sizes, "boxes": batch.boxes, "labels": batch.labels}
    targets = map_parts(assign, (), marks, count, mesh)
    divisors = objective.normalizers(targets)

    def loss_of(learned: PyTree, fixed: PyTree, part: dict[str, Any]) -> Value:
        params, concepts = learned
        model = build(params)
        return objective.matched_losses(
            model, _encode(model, part), model.scale() * concepts, fixed["token_mask"],
            part["targets"], fixed["divisors"], canvas, config, with_boxes,
        )  # fmt: skip

    fixed = {"token_mask": batch.token_mask, "divisors": divisors}
    (loss, figures), (gradient, slope) = sum_parts(
        loss_of, (params, concepts), fixed, images | {"targets": targets}, count, mesh
    )
    return (loss, figures | {"positives": divisors["positives"]}), gradient, slope


def _image_text(
    params: PyTree,
    concepts: Float[Array, "M D"],
    images: dict[str, Array],
    batch: Batch,
    build: Callable[[PyTree], detclip.DetCLIP],
    config: LossConfig,
    count: int,
    mesh: Mesh | None,
) -> tuple[Value, PyTree, Float[Array, "M D"]]:
    """Each image is a candidate of every other's text: two passes.

    The first keeps the chosen regions' features, from which come the loss and its gradient by them
    (as in GradCache: Gao et al., RepL4NLP 2021); the second takes that gradient on to the
    parameters.
    """
    canvas = batch.images.shape[1:3]
    pools = objective.concept_pools(batch, config)
    # A part may begin within a group of images that share a pool, so pools go by smaller runs:
    # of the most images that divide both.
    in_pool = len(batch.images) // len(pools)
    in_part = len(batch.images) // (count * (1 if mesh is None else mesh.size))
    pools = jnp.repeat(pools, in_pool // math.gcd(in_pool, in_part), axis=0)

    def choose(whole: PyTree, part: dict[str, Array]) -> tuple[Array, objective.Selection]:
        params, concepts = whole
        model = build(params)
        regions = _encode(model, part)
        chosen = objective.select_regions(
            model, regions, concepts, part["pools"], part["sizes"], canvas, config.proposals
        )
        return objective.gather_regions(regions, chosen), chosen

    first = images | {"pools": pools}
    features, chosen = map_parts(choose, (params, concepts), first, count, mesh)

    def loss_of(params: PyTree, features: Array, concepts: Array) -> Value:
        scale = build(params).scale()
        return objective.contrast(scale, features, chosen, concepts, batch.texts, config)

    value, (by_scale, by_features, by_concepts) = jax.value_and_grad(
        loss_of, argnums=(0, 1, 2), has_aux=True
    )(params, features, concepts)

    def along(params: PyTree, _: PyTree, part: dict[str, Any]) -> tuple[Array, tuple[()]]:
        regions = _encode(build(params), part)
        return jnp.sum(objective.gather_regions(regions, part["chosen"]) * part["slope"]), ()

    second = images | {"chosen": chosen, "slope": by_features}
    _, gradient = sum_parts(along, params, (), second, count, mesh)
    return value, jax.tree.map(jnp.add, gradient, by_scale), by_concepts


def _encode(model: detclip.DetCLIP, part: dict[str, Array]) -> detclip.RegionOutputs:
    drop_path_factors = part.get("drop_path_factors")
    return model.encode_image(
        part["pixels"],
        None if drop_path_factors is None else jnp.moveaxis(drop_path_factors, 0, -1),
    )


def map_parts(
    fn: Callable[[PyTree, PyTree], PyTree],
    whole: PyTree,
    images: PyTree,
    count: int,
    mesh: Mesh | None,
) -> PyTree:
    """`fn(whole, part)` for `count` parts of `images` a device, put together again.

    Args:
      fn: gives arrays whose first axis is the part's.
      whole: what every part needs; each device holds it whole.
      images: arrays whose first axis is split over all devices; a part has its share of each.
      count: parts on each device, one after another.
      mesh: the devices; None is one.
    """

    def run(whole: PyTree, images: PyTree) -> PyTree:
        outputs = jax.lax.map(lambda part: fn(whole, part), _cut(images, count))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    if mesh is None:
        return run(whole, images)
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    return _on_each_device(run, mesh, (everywhere, split), split)(whole, images)


def sum_parts(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[Float[Array, ""], PyTree]],
    learned: PyTree,
    fixed: PyTree,
    images: PyTree,
    count: int,
    mesh: Mesh | None,
) -> tuple[tuple[Float[Array, ""], PyTree], PyTree]:
    """The sum of `fn(learned, fixed, part)` over all parts and devices, and its gradient.

    `fn` gives a scalar and others beside it, as for `jax.value_and_grad(has_aux=True)`, and so does
    this: ((scalar, others), gradient by `learned`). `fixed` is whole as `learned` is, without
    gradient; the rest as for `map_parts`.
    """

    def run(learned: PyTree, fixed: PyTree, images: PyTree) -> PyTree:
        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            found = jax.value_and_grad(fn, has_aux=True)(learned, fixed, part)
            return jax.tree.map(jnp.add, total, found), None

        parts = _cut(images, count)
        shapes = jax.eval_shape(fn, learned, fixed, jax.tree.map(lambda x: x[0], parts))
        begin = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, learned))
        total, _ = jax.lax.scan(add, begin, parts)
        return total if mesh is None else jax.lax.psum(total, mesh.axis_names)

    if mesh is None:
        return run(learned, fixed, images)
    everywhere, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = (everywhere, everywhere, split)
    return _on_each_device(run, mesh, specs, everywhere)(learned, fixed, images)


def _cut(images: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), images)


def _on_each_device(run: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Any:
    # A device's gradient is of its own images until the sum above: nothing to be checked for.
    return jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
