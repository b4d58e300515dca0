"""One training step: where model, losses and optimizer meet (paper §3)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.ops import contrastive, losses, nms
from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.contrastive import ContrastiveConfig
from detclipv2_jax.optimizer import AdamW
from detclipv2_jax.state import TrainState
from detclipv2_jax.structures import Batch

Losses = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ProposalConfig:
    """Which regions of a captioned image its concepts may choose from (paper §3.3)."""

    score: contrastive.ProposalScore = "batch"
    group: int = 192  # images whose concepts score a region together: the paper's batch a device
    pre_nms: int = 1000  # best regions a pyramid level that enter NMS [ours]
    nms_iou: float = 0.6  # [ours]
    k: int = 100  # regions an image


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and parameters of the losses (paper eq. 6, §4.1)."""

    box: float = 2.0  # α
    centerness: float = 1.0  # β
    contrastive: float = 0.1  # λ
    candidates: int = 9  # anchors a level that ATSS considers for a box
    grounding_boxes: bool = False  # L_box and L_ctr on grounding data too; its boxes are loose
    word_region: ContrastiveConfig = ContrastiveConfig()
    proposals: ProposalConfig = ProposalConfig()


def encode_concepts(
    model: DetCLIP, tokens: Int[Array, "M L"], gathered: NamedSharding | None
) -> Float[Array, "M D"]:
    """The step's concepts, each encoded once by one device and then held by all (`gathered`)."""
    features = model.encode_text(tokens)
    return features if gathered is None else jax.lax.with_sharding_constraint(features, gathered)


def dense_losses(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    gathered: NamedSharding | None = None,
) -> tuple[Array, Losses]:
    """Detection and grounding: every anchor against every concept of the global batch.

    L = L_align + α L_box + β L_ctr, and L_align alone for grounding (paper eq. 6). Normalised as in
    ATSS by the positives of the global batch; GIoU is weighted by the centerness target.
    """
    height, width = batch.images.shape[1:3]
    anchors = jnp.asarray(box_ops.anchor_grid(height, width, model.cfg.anchors))
    sizes = box_ops.level_sizes(height, width, model.cfg.anchors)
    anchor_mask = box_ops.anchors_inside(anchors, batch.sizes)

    regions = model.encode_image(batch.images, key)
    texts = model.scale() * encode_concepts(model, batch.tokens, gathered)

    # A box whose concept found no row in the step's table is neither object nor background.
    real = batch.boxes[..., 2] > batch.boxes[..., 0]
    assign = functools.partial(atss_assign, topk=config.candidates)
    matched = jax.vmap(assign, in_axes=(None, 0, None, 0, 0))(
        anchors, anchor_mask, sizes, batch.boxes, real
    )
    positive = matched >= 0
    box = jnp.take_along_axis(batch.boxes, jnp.maximum(matched, 0)[..., None], axis=1)
    label = jnp.where(
        positive, jnp.take_along_axis(batch.labels, jnp.maximum(matched, 0), axis=1), -1
    )
    scored = anchor_mask & ~(positive & (label < 0))

    positives = jnp.maximum(positive.sum(), 1).astype(jnp.float32)
    align = losses.alignment_loss(
        regions.embeddings, texts, model.logit_bias[...], label, scored, batch.token_mask
    )
    parts = {"align": align / positives}
    total = parts["align"]
    if batch.kind == "detection" or config.grounding_boxes:
        parts |= _box_losses(model, anchors, regions, box, positive, positives)
        total = total + config.box * parts["box"] + config.centerness * parts["centerness"]
    return total, parts | {"positives": positives}


def _box_losses(
    model: DetCLIP,
    anchors: Float[Array, "K 4"],
    regions: detclip.RegionOutputs,
    box: Float[Array, "B K 4"],
    positive: Bool[Array, "B K"],
    positives: Float[Array, ""],
) -> Losses:
    target = jnp.where(positive, box_ops.centerness_targets(anchors, box), 0.0)
    # Where nothing is matched the anchor stands in for the box: finite values with zero weight.
    box = jnp.where(positive[..., None], box, anchors)
    predicted = box_ops.decode_deltas(anchors, regions.deltas)
    giou = (losses.giou_loss(predicted, box) * target).sum() / jnp.maximum(target.sum(), 1e-6)
    bce = losses.binary_cross_entropy(regions.centerness, target)
    return {"box": giou, "centerness": jnp.where(positive, bce, 0.0).sum() / positives}


def image_text_losses(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    gathered: NamedSharding | None = None,
) -> tuple[Array, Losses]:
    """Image-text pairs: λ L_cts between the captions' concepts and chosen regions (eq. 3–5)."""
    regions = model.encode_image(batch.images, key)
    concepts = encode_concepts(model, batch.tokens, gathered)
    chosen, mask, areas = select_regions(model, batch, regions, concepts, config.proposals)
    loss = contrastive.word_region_contrastive(
        chosen, mask, areas, concepts, batch.texts, model.scale(), config.word_region
    )
    return config.contrastive * loss, {"contrastive": loss}


def select_regions(
    model: DetCLIP,
    batch: Batch,
    regions: detclip.RegionOutputs,
    concepts: Float[Array, "M D"],
    config: ProposalConfig,
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"], Float[Array, "B P"]]:
    """The k regions of each image that its batch's concepts like best: features, mask, areas.

    NMS comes before the cut. The choice carries no gradient (paper §3.3); the features do.
    """
    height, width = batch.images.shape[1:3]
    grid = model.cfg.anchors
    anchors = jnp.asarray(box_ops.anchor_grid(height, width, grid))
    levels = box_ops.level_sizes(height, width, grid)
    fixed = jax.lax.stop_gradient(regions)
    objectness = contrastive.proposal_scores(
        fixed.embeddings,
        jax.lax.stop_gradient(concepts),
        batch.texts,
        fixed.centerness,
        score=config.score,
        group=config.group,
        scale=model.scale(),
        bias=model.logit_bias[...],
    )
    boxes = box_ops.decode_deltas(anchors, fixed.deltas)
    inside = box_ops.anchors_inside(anchors, batch.sizes)

    def select(box: Float[Array, "K 4"], score: Float[Array, " K"], mask: Bool[Array, " K"]) -> Any:
        return nms.select_proposals(
            box, score, mask, levels,
            pre_nms_per_level=config.pre_nms, iou_threshold=config.nms_iou, k=config.k,
        )  # fmt: skip

    indices: Int[Array, "B P"]
    indices, mask = jax.vmap(select)(boxes, objectness, inside)
    gather = lambda values: jnp.take_along_axis(values, indices[..., None], axis=1)  # noqa: E731
    return gather(regions.embeddings), mask, box_ops.area(gather(boxes))


def losses_of(
    kind: Literal["detection", "grounding", "image_text"],
) -> Callable[..., tuple[Array, Losses]]:
    """The loss of a kind of data."""
    return image_text_losses if kind == "image_text" else dense_losses


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: Any,
    optimizer: AdamW,
    config: LossConfig,
    seed: int,
    gathered: NamedSharding | None = None,
) -> tuple[TrainState, Losses]:
    """One update on one global batch of one kind.

    `gathered` is how all devices hold an array whole; None on one device.

    A step whose loss or gradient is not finite changes nothing but the counters `skipped`.

    Returns:
      The new state, and scalars: the total `loss`, its parts, the global norm of the gradient, the
      similarity's scale, `skipped` and `skipped_in_row`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_of(params: PyTree) -> tuple[Array, Losses]:
        if gathered is not None:  # else the compiler would split activations as parameters are
            params = jax.lax.with_sharding_constraint(params, gathered)
        model = detclip.build(graphdef, params)
        return losses_of(batch.kind)(model, batch, config, key, gathered)

    (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, ema, moments = optimizer.update(
        state.params, state.ema, state.moments, gradients, norm, state.step, finite
    )
    bad = (~finite).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema,
        moments=moments,
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + bad) * bad,
    )
    metrics = {
        "loss": loss,
        **parts,
        "gradient_norm": norm,
        "scale": jnp.exp(params["logit_scale"]),
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics
