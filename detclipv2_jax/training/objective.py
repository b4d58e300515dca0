"""What a step minimizes: the losses of a global batch of each kind (paper §3)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.ops import contrastive, losses, nms
from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.contrastive import ContrastiveConfig

Losses = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ProposalConfig:
    """Which regions of a captioned image its concepts may choose from (paper §3.3)."""

    RENAMED = {"pre_nms": "pre_nms_top_k"}

    score: contrastive.ProposalScore = "batch"
    group: int = 192  # images whose concepts score a region together: the paper's batch a device
    pre_nms_top_k: int = 1000  # best regions a pyramid level that enter NMS [ours]
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
    model: DetCLIP, tokens: Int[Array, "M L"], replicated: NamedSharding | None
) -> Float[Array, "M D"]:
    """The step's concepts, each encoded once by one device and then held by all (`replicated`)."""
    features = model.encode_text(tokens)
    return (
        features if replicated is None else jax.lax.with_sharding_constraint(features, replicated)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What detection and grounding ask of every anchor."""

    positive: Bool[Array, "B K"]  # it is matched with a box
    label: Int[Array, "B K"]  # row of the step's table; -1: no concept
    scored: Bool[Array, "B K"]  # its logits count
    box: Float[Array, "B K 4"]  # its own where nothing is matched: finite values with zero weight
    centerness: Float[Array, "B K"]


def dense_targets(
    sizes: Int[Array, "B 2"],
    boxes: Float[Array, "B N 4"],
    labels: Int[Array, "B N"],
    canvas: tuple[int, int],
    grid: box_ops.AnchorConfig,
    candidates: int,
) -> Targets:
    """ATSS's assignment, on a canvas of (height, width); no parameter takes part in it."""
    anchors = jnp.asarray(box_ops.anchor_grid(*canvas, grid))
    anchor_mask = box_ops.anchors_inside(anchors, sizes)
    # A box whose concept found no row in the step's table is neither object nor background.
    real = boxes[..., 2] > boxes[..., 0]
    assign = functools.partial(atss_assign, topk=candidates)
    matched = jax.vmap(assign, in_axes=(None, 0, None, 0, 0))(
        anchors, anchor_mask, box_ops.level_sizes(*canvas, grid), boxes, real
    )
    positive = matched >= 0
    box = jnp.take_along_axis(boxes, jnp.maximum(matched, 0)[..., None], axis=1)
    label = jnp.where(positive, jnp.take_along_axis(labels, jnp.maximum(matched, 0), axis=1), -1)
    return Targets(
        positive=positive,
        label=label,
        scored=anchor_mask & ~(positive & (label < 0)),
        box=jnp.where(positive[..., None], box, anchors),
        centerness=jnp.where(positive, box_ops.centerness_targets(anchors, box), 0.0),
    )


def normalizers(targets: Targets) -> Losses:
    """What the global batch's losses are divided by, as in ATSS."""
    return {
        "positives": jnp.maximum(targets.positive.sum(), 1).astype(jnp.float32),
        "centerness": jnp.maximum(targets.centerness.sum(), 1e-6),
    }


def dense_losses(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    replicated: NamedSharding | None = None,
) -> tuple[Array, Losses]:
    """Detection and grounding: every anchor against every concept of the global batch.

    L = L_align + α L_box + β L_ctr, and L_align alone for grounding (paper eq. 6). Normalized as in
    ATSS by the positives of the global batch; GIoU is weighted by the centerness target.
    """
    drop_path_factors = model.backbone.draw_drop_path(key, len(batch.images))
    regions = model.encode_image(batch.images, drop_path_factors)
    texts = model.scale() * encode_concepts(model, batch.tokens, replicated)
    canvas, with_boxes = batch.images.shape[1:3], has_box_losses(batch.kind, config)
    assign = functools.partial(
        dense_targets, canvas=canvas, grid=model.cfg.anchors, candidates=config.candidates
    )
    if replicated is not None:
        # Said image by image: the compiler would gather what a top-k reads, gigabytes of distances.
        split = PartitionSpec(replicated.mesh.axis_names)
        assign = jax.shard_map(assign, mesh=replicated.mesh, in_specs=split, out_specs=split)
    targets = assign(batch.sizes, batch.boxes, batch.labels)
    divisors = normalizers(targets)
    total, parts = matched_losses(
        model, regions, texts, batch.token_mask, targets, divisors, canvas, config, with_boxes
    )
    return total, parts | {"positives": divisors["positives"]}


def has_box_losses(kind: str, config: LossConfig) -> bool:
    """Do this kind's boxes teach L_box and L_ctr?"""
    return kind == "detection" or config.grounding_boxes


def matched_losses(
    model: DetCLIP,
    regions: detclip.RegionOutputs,
    texts: Float[Array, "M D"],
    token_mask: Bool[Array, " M"],
    targets: Targets,
    divisors: Losses,
    canvas: tuple[int, int],
    config: LossConfig,
    with_boxes: bool,
) -> tuple[Array, Losses]:
    """The dense losses of some of a global batch's images: sums over `normalizers` of all of it.

    `texts` come multiplied by the similarity's scale.
    """
    align = losses.alignment_loss(
        regions.embeddings, texts, model.logit_bias[...], targets.label, targets.scored, token_mask
    )
    parts = {"align": align / divisors["positives"]}
    if not with_boxes:
        return parts["align"], parts
    anchors = jnp.asarray(box_ops.anchor_grid(*canvas, model.cfg.anchors))
    parts |= _box_losses(anchors, regions, targets, divisors)
    total = parts["align"] + config.box * parts["box"] + config.centerness * parts["centerness"]
    return total, parts


def _box_losses(
    anchors: Float[Array, "K 4"],
    regions: detclip.RegionOutputs,
    targets: Targets,
    divisors: Losses,
) -> Losses:
    predicted = box_ops.decode_deltas(anchors, regions.deltas)
    giou = (losses.giou_loss(predicted, targets.box) * targets.centerness).sum()
    bce = losses.binary_cross_entropy(regions.centerness, targets.centerness)
    return {
        "box": giou / divisors["centerness"],
        "centerness": jnp.where(targets.positive, bce, 0.0).sum() / divisors["positives"],
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The k regions of each image that take part in the contrast."""

    indices: Int[Array, "B P"]  # of their anchors
    mask: Bool[Array, "B P"]  # False: the image has no more
    areas: Float[Array, "B P"]  # of their boxes, square pixels


def image_text_losses(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    replicated: NamedSharding | None = None,
) -> tuple[Array, Losses]:
    """Image-text pairs: λ L_cts between the captions' concepts and chosen regions (eq. 3–5)."""
    drop_path_factors = model.backbone.draw_drop_path(key, len(batch.images))
    regions = model.encode_image(batch.images, drop_path_factors)
    concepts = encode_concepts(model, batch.tokens, replicated)
    pools = concept_pools(batch, config)
    chosen = select_regions(
        model, regions, concepts, pools, batch.sizes, batch.images.shape[1:3], config.proposals
    )
    features = gather_regions(regions, chosen)
    return contrast(model.scale(), features, chosen, concepts, batch.texts, config)


def concept_pools(batch: Batch, config: LossConfig) -> Int[Array, "G N"]:
    """The concepts from which each group of images is scored."""
    return contrastive.concept_pools(batch.texts, config.proposals.score, config.proposals.group)


def contrast(
    scale: Float[Array, ""],
    features: Float[Array, "B P D"],
    chosen: Selection,
    concepts: Float[Array, "M D"],
    texts: Int[Array, "B C"],
    config: LossConfig,
) -> tuple[Array, Losses]:
    """λ L_cts of a whole global batch, from its chosen regions' features."""
    loss = contrastive.word_region_contrastive(
        features, chosen.mask, chosen.areas, concepts, texts, scale, config.word_region
    )
    return config.contrastive * loss, {"contrastive": loss}


def gather_regions(regions: detclip.RegionOutputs, chosen: Selection) -> Float[Array, "B P D"]:
    """The embeddings of the chosen regions."""
    return jnp.take_along_axis(regions.embeddings, chosen.indices[..., None], axis=1)


def select_regions(
    model: DetCLIP,
    regions: detclip.RegionOutputs,
    concepts: Float[Array, "M D"],
    pools: Int[Array, "G N"],
    sizes: Int[Array, "B 2"],
    canvas: tuple[int, int],
    config: ProposalConfig,
) -> Selection:
    """The k regions of each image that the concepts of its pool like best.

    NMS comes before the cut. The choice carries no gradient (paper §3.3); the features do.
    """
    grid = model.cfg.anchors
    anchors = jnp.asarray(box_ops.anchor_grid(*canvas, grid))
    levels = box_ops.level_sizes(*canvas, grid)
    fixed = jax.lax.stop_gradient(regions)
    objectness = contrastive.proposal_scores(
        fixed.embeddings,
        jax.lax.stop_gradient(concepts),
        pools,
        fixed.centerness,
        score=config.score,
        scale=model.scale(),
        bias=model.logit_bias[...],
    )
    boxes = box_ops.decode_deltas(anchors, fixed.deltas)
    inside = box_ops.anchors_inside(anchors, sizes)

    def select(box: Float[Array, "K 4"], score: Float[Array, " K"], mask: Bool[Array, " K"]) -> Any:
        return nms.select_proposals(
            box, score, mask, levels,
            pre_nms_per_level=config.pre_nms_top_k, iou_threshold=config.nms_iou, k=config.k,
        )  # fmt: skip

    indices, mask = jax.vmap(select)(boxes, objectness, inside)
    areas = box_ops.area(jnp.take_along_axis(boxes, indices[..., None], axis=1))
    return Selection(indices, mask, areas)


def losses_of(
    kind: Literal["detection", "grounding", "image_text"],
) -> Callable[..., tuple[Array, Losses]]:
    """The loss of a kind of data."""
    return image_text_losses if kind == "image_text" else dense_losses
