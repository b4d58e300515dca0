"""Images and concepts of a global batch through the towers, each device computing its own share."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP


def encode_images(
    model: DetCLIP,
    batch: Batch,
    drop_path_factors: Float[Array, "N 2 B"] | None,
    replicated: NamedSharding | None,
) -> detclip.RegionOutputs:
    """Return `model.encode_image` of a global batch in training.

    Each device computes its own images, up to the outputs of the head.
    """
    inputs = batch.images, drop_path_factors, batch.sizes
    if replicated is None:
        return model.encode_image(*inputs, training=True)
    split = PartitionSpec(replicated.mesh.axis_names)
    specs = split, PartitionSpec(None, None, *split), split
    outputs = _on_each_device(
        lambda model, inputs: model.head_outputs(*inputs),
        model, ("backbone", "neck", "head"), inputs, specs, replicated,
    )  # fmt: skip
    return model.comparable_regions(outputs, batch.canvas, batch.sizes, training=True)


@jax.named_scope("encode_concepts")
def encode_concepts(
    model: DetCLIP, tokens: Int[Array, "M L"], replicated: NamedSharding | None
) -> Float[Array, "M D"]:
    """Return the features of the step's concepts.

    Each concept is encoded once, by one device, and then replicated on all devices. If the devices
    cannot share the rows evenly, each encodes all of them.
    """
    if replicated is None:
        return model.encode_text(tokens)
    if len(tokens) % replicated.mesh.size:
        features = model.encode_text(tokens)
    else:
        encode = lambda model, tokens: model.encode_text(tokens)
        split = PartitionSpec(replicated.mesh.axis_names)
        features = _on_each_device(encode, model, ("text",), tokens, split, replicated)
    return jax.lax.with_sharding_constraint(features, replicated)


def _on_each_device(
    run: Callable[[DetCLIP, PyTree], PyTree],
    model: DetCLIP,
    parts: Sequence[str],
    inputs: PyTree,
    specs: PyTree,
    replicated: NamedSharding,
) -> PyTree:
    """Return `run(model, inputs)` with the inputs split over all devices, and so the outputs.

    The sum of a gradient over the devices is in float32, like the sum over micro-batches: the
    parameters enter in float32, so each device's gradient is float32 when it leaves. The compiler
    alone would sum the gradient of a bfloat16 layer in bfloat16, which loses a bit per doubling of
    the devices.

    Args:
      run: reads the parameters of `parts` only.
      model: with every parameter on every device.
      parts: of the model, whose parameters get a gradient.
      inputs: arrays.
      specs: how they are split over the devices.
      replicated: sharding of an array that every device holds.
    """
    graphdef, read, rest = nnx.split(model, lambda path, _: path[0] in parts, ...)
    whole, split = PartitionSpec(), PartitionSpec(replicated.mesh.axis_names)

    def on_one(read: nnx.State, rest: nnx.State, inputs: PyTree) -> PyTree:
        return run(nnx.merge(graphdef, read, rest), inputs)

    # check_vma: as in accumulate.py, the gradients differ between devices until they are summed.
    on_all = jax.shard_map(
        on_one, mesh=replicated.mesh, in_specs=(whole, whole, specs), out_specs=split,
        check_vma=False,
    )  # fmt: skip
    return on_all(read, jax.lax.stop_gradient(rest), inputs)
