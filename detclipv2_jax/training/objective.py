"""The loss of a global batch of each kind of data (Yao et al. 2023, §3 and appendix C).

Detection and grounding compare every anchor with every concept of the step (`dense_loss`).
Image-text pairs contrast captions with the best regions of each image (`image_text_loss`). Images
with a class look for its name among the names of the step (`classification_loss`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import Kind
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.ops import classification, contrastive, losses, nms, proposals
from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.contrastive import ContrastiveConfig
from detclipv2_jax.training.encoding import encode_concepts, encode_images

Scalars = dict[str, Float[Array, ""]]  # by their names in metrics.jsonl


class Loss(NamedTuple):
    """The loss of a batch."""

    total: Float[Array, ""]  # the value that is minimized
    # Its unweighted terms and the number of positives, scalars by their names in metrics.jsonl; and
    # `RegionOutputs.statistics`, nested arrays.
    terms: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ProposalConfig:
    """Which regions of a captioned image its concepts are compared with (paper §3.3).

    The scores "foreground" and "iou" need the head's output of that name
    (`model.head.proposal_scores`), which boxed data train.
    """

    RENAMED = {"pre_nms": "pre_nms_top_k"}
    RENAMED_VALUES = {"score": {"classification": "step"}}

    score: proposals.ProposalScore = "batch"  # what ranks the regions (ops/proposals.py)
    group: int = 192  # images whose concepts score a region together: the paper's batch per device
    pre_nms_top_k: int = 1000  # best regions per pyramid level that enter NMS [ours]
    nms_iou: float = 0.6  # [ours]
    k: int = 100  # regions per image; image_text only


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and parameters of the losses (paper eq. 6, §4.1)."""

    box: float = 2.0  # α
    centerness: float = 1.0  # β
    contrastive: float = 0.1  # λ
    classification: float = 0.1  # λ of the cross-entropy over class names (paper, appendix C)
    classification_k: int = 1  # regions per image of classification data (paper, appendix C)
    candidates: int = 9  # anchors per level that ATSS considers for a box
    grounding_boxes: bool = False  # L_box and L_ctr on grounding data too; its boxes are loose
    proposal_heads: float = 1.0  # weight of each of the head's `proposal_scores`, if any [ours]
    word_region: ContrastiveConfig = ContrastiveConfig()
    proposals: ProposalConfig = ProposalConfig()


def loss_function(kind: Kind) -> Callable[..., Loss]:
    """Return the loss function of a kind of data."""
    of_texts = {"image_text": image_text_loss, "classification": classification_loss}
    return of_texts.get(kind, dense_loss)


def regions_per_image(kind: Kind, config: LossConfig) -> int:
    """Return how many regions of each image a kind of data with texts learns from."""
    return config.classification_k if kind == "classification" else config.proposals.k


def dense_loss(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    replicated: NamedSharding | None = None,
) -> Loss:
    """Return the loss of a detection or grounding batch.

    L = L_align + α L_box + β L_ctr, and L_align alone for grounding (paper eq. 6). As in ATSS, sums
    are divided by the number of positives of the global batch, and GIoU is weighted by the
    centerness target. Each of the head's `proposal_scores`, if any, adds a term.

    Args:
      model: the detector.
      batch: the global batch. The anchors of each image are compared with the concepts of its
        table that name their box, or that the image is scored on.
      config: weights of the terms.
      key: random key of the drop path; None for none.
      replicated: sharding of an array that every device holds; None on one device.
    """
    drop_path_factors = model.backbone.draw_drop_path(key, len(batch.images))
    regions = encode_images(model, batch, drop_path_factors, replicated)
    scaled_concepts = model.scale() * encode_concepts(model, batch.tokens, replicated)
    canvas, with_boxes = batch.canvas, has_box_losses(batch.kind, config)
    assign = functools.partial(
        assign_targets, canvas=canvas, grid=model.cfg.anchors, candidates=config.candidates
    )
    if replicated is not None:
        # Each device assigns its own images. Without shard_map the compiler gathers the input of
        # ATSS's top-k: gigabytes of distances.
        split = PartitionSpec(replicated.mesh.axis_names)
        assign = jax.shard_map(assign, mesh=replicated.mesh, in_specs=split, out_specs=split)
    targets = assign(batch.sizes, batch.boxes, batch.labels)
    divisors = normalizers(targets)
    total, terms = loss_of_targets(
        model, regions, scaled_concepts, batch.token_mask, batch.scored, targets, divisors, canvas,
        config, with_boxes,
    )  # fmt: skip
    return Loss(total, terms | {"positives": divisors.positives})


def has_box_losses(kind: str, config: LossConfig) -> bool:
    """Return whether a kind of data has the terms L_box and L_ctr."""
    return kind == "detection" or config.grounding_boxes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Training targets of the anchors of a detection or grounding batch."""

    positive: Bool[Array, "B K"]  # matched with a box
    labels: Int[Array, "B K L"]  # the concepts' rows of the step's table; -1 pads
    counted: Bool[Array, "B K"]  # takes part in the alignment loss
    box: Float[Array, "B K 4"]  # the anchor itself if not positive: finite, with zero weight
    centerness: Float[Array, "B K"]


@jax.named_scope("assignment")
def assign_targets(
    sizes: Int[Array, "B 2"],
    boxes: Float[Array, "B N 4"],
    labels: Int[Array, "B N L"],
    canvas: tuple[int, int],
    grid: box_ops.AnchorConfig,
    candidates: int,
) -> Targets:
    """Assign boxes to anchors by ATSS. No parameter of the model takes part.

    Args:
      sizes: height and width of each image on the canvas, pixels.
      boxes: xyxy, pixels; a box without width is padding.
      labels: rows of the step's table that name each box; -1 pads.
      canvas: padded image size (height, width), pixels.
      grid: the anchors.
      candidates: anchors per level that ATSS considers for a box.
    """
    anchors = jnp.asarray(box_ops.anchor_grid(*canvas, grid))
    anchor_mask = box_ops.anchors_inside(anchors, sizes)
    # A box whose concepts are not in the step's table is neither object nor background: its anchors
    # are matched with it, but do not count.
    real = boxes[..., 2] > boxes[..., 0]
    assign = functools.partial(atss_assign, topk=candidates)
    matched = jax.vmap(assign, in_axes=(None, 0, None, 0, 0))(
        anchors, anchor_mask, box_ops.level_sizes(*canvas, grid), boxes, real
    )
    positive = matched >= 0
    own = jnp.maximum(matched, 0)[..., None]
    box = jnp.take_along_axis(boxes, own, axis=1)
    labels = jnp.where(positive[..., None], jnp.take_along_axis(labels, own, axis=1), -1)
    return Targets(
        positive=positive,
        labels=labels,
        counted=anchor_mask & ~(positive & (labels < 0).all(axis=-1)),
        box=jnp.where(positive[..., None], box, anchors),
        centerness=jnp.where(positive, box_ops.centerness_targets(anchors, box), 0.0),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalizers:
    """Divisors of the loss sums of a global batch, as in ATSS."""

    centerness: Float[Array, ""]  # sum of the centerness targets: for L_box
    positives: Float[Array, ""]  # number of positive anchors: for L_align and L_ctr


def normalizers(targets: Targets) -> Normalizers:
    """Return the normalizers of a global batch from all of its targets."""
    return Normalizers(
        positives=jnp.maximum(targets.positive.sum(), 1).astype(jnp.float32),
        centerness=jnp.maximum(targets.centerness.sum(), 1e-6),
    )


def loss_of_targets(
    model: DetCLIP,
    regions: detclip.RegionOutputs,
    scaled_concepts: Float[Array, "M D"],
    token_mask: Bool[Array, " M"],
    scored: Bool[Array, "B M"],
    targets: Targets,
    divisors: Normalizers,
    canvas: tuple[int, int],
    config: LossConfig,
    with_boxes: bool,
) -> Loss:
    """Return the dense loss of some images of a global batch.

    The terms of all images of the batch add up to those of the batch.

    Args:
      model: read for the anchors and the logit bias.
      regions: outputs for these images.
      scaled_concepts: the concepts' features times the scale of the similarity.
      token_mask: False for unused rows of the step's table.
      scored: the concepts that these images may be a negative of.
      targets: of these images.
      divisors: of the global batch.
      canvas: padded image size (height, width), pixels.
      config: weights of the terms.
      with_boxes: False leaves out L_box and L_ctr.
    """
    with jax.named_scope("alignment_loss"):
        align = losses.alignment_loss(
            regions.embeddings, scaled_concepts, model.logit_bias[...], targets.labels,
            targets.counted, token_mask, scored,
        )  # fmt: skip
    weighted = {"align": (1.0, align / divisors.positives)}
    if with_boxes:
        anchors = jnp.asarray(box_ops.anchor_grid(*canvas, model.cfg.anchors))
        boxes = box_ops.decode_deltas(anchors, regions.deltas)
        weighted["box"] = config.box, _box_loss(boxes, targets, divisors)
        weighted["centerness"] = config.centerness, _centerness_loss(regions, targets, divisors)
        if "iou" in regions.proposal_logits:
            weighted["iou"] = config.proposal_heads, _iou_loss(regions, boxes, targets, divisors)
    if "foreground" in regions.proposal_logits:
        weighted["foreground"] = config.proposal_heads, _foreground_loss(regions, targets, divisors)
    terms = (weight * term for weight, term in weighted.values())
    total = sum(terms, start=jnp.zeros((), jnp.float32))
    return Loss(total, {name: term for name, (_, term) in weighted.items()} | regions.statistics)


@jax.named_scope("box_loss")
def _box_loss(
    predicted: Float[Array, "B K 4"], targets: Targets, divisors: Normalizers
) -> Float[Array, ""]:
    giou = (losses.giou_loss(predicted, targets.box) * targets.centerness).sum()
    return giou / divisors.centerness


@jax.named_scope("centerness_loss")
def _centerness_loss(
    regions: detclip.RegionOutputs, targets: Targets, divisors: Normalizers
) -> Float[Array, ""]:
    bce = losses.binary_cross_entropy(regions.centerness, targets.centerness)
    return jnp.where(targets.positive, bce, 0.0).sum() / divisors.positives


@jax.named_scope("foreground_loss")
def _foreground_loss(
    regions: detclip.RegionOutputs, targets: Targets, divisors: Normalizers
) -> Float[Array, ""]:
    """Return the focal loss of "the anchor is positive for any concept" [ours].

    The paper (§4.2.1) names the score alone. A box whose concepts have no row is an object too.
    """
    logits = regions.proposal_logits["foreground"]
    focal = losses.sigmoid_focal(logits, targets.positive)
    counts = targets.counted | targets.positive
    return jnp.where(counts, focal, 0.0).sum() / divisors.positives


@jax.named_scope("iou_loss")
def _iou_loss(
    regions: detclip.RegionOutputs,
    predicted: Float[Array, "B K 4"],
    targets: Targets,
    divisors: Normalizers,
) -> Float[Array, ""]:
    """Return the cross-entropy of positive anchors with the IoU of their predicted box [ours].

    As in IoU-aware detectors (Wu et al. 2020, §3.2). The IoU itself gets no gradient.
    """
    iou = jax.lax.stop_gradient(box_ops.iou(predicted, targets.box))
    bce = losses.binary_cross_entropy(regions.proposal_logits["iou"], iou)
    return jnp.where(targets.positive, bce, 0.0).sum() / divisors.positives


def image_text_loss(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    replicated: NamedSharding | None = None,
) -> Loss:
    """Return the loss λ L_cts of a batch of image-text pairs (paper eq. 3-5).

    It contrasts the concepts of the captions with selected regions of the images. The arguments are
    those of `dense_loss`.
    """
    drop_path_factors = model.backbone.draw_drop_path(key, len(batch.images))
    regions = encode_images(model, batch, drop_path_factors, replicated)
    concepts = encode_concepts(model, batch.tokens, replicated)
    pools = concept_pools(batch, config)
    selection = select_regions(
        model, regions, concepts, pools, batch.sizes, batch.canvas, config.proposals
    )
    features = selected_embeddings(regions, selection)
    total, terms = contrastive_loss(
        model.scale(), features, selection, concepts, batch.texts, config
    )
    return Loss(total, terms | regions.statistics)


def concept_pools(batch: Batch, config: LossConfig) -> Int[Array, "G N"]:
    """Return, for each group of images, the concepts that score their regions; -1 pads."""
    return proposals.concept_pools(batch.texts, config.proposals.score, config.proposals.group)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """The k regions of each image that take part in the contrastive loss."""

    indices: Int[Array, "B P"]  # of their anchors
    mask: Bool[Array, "B P"]  # False: padding, the image has fewer regions
    areas: Float[Array, "B P"]  # of their boxes inside the image, square pixels


@jax.named_scope("select_regions")
def select_regions(
    model: DetCLIP,
    regions: detclip.RegionOutputs,
    concepts: Float[Array, "M D"],
    pools: Int[Array, "G N"],
    sizes: Int[Array, "B 2"],
    canvas: tuple[int, int],
    config: ProposalConfig,
) -> Selection:
    """Select the k regions of each image with the highest proposal scores, after NMS.

    Boxes are clipped to the image before NMS, as in MMDetection; a box without area inside the
    image is no region. The selection has no gradient (paper §3.3); the features of the selected
    regions have one.

    Args:
      model: read for the anchors, the scale and the bias.
      regions: outputs for the images.
      concepts: features of the step's concepts.
      pools: the concepts that score each group of images (`concept_pools`).
      sizes: height and width of each image on the canvas, pixels.
      canvas: padded image size (height, width), pixels.
      config: score, NMS and number of regions.
    """
    grid = model.cfg.anchors
    anchors = jnp.asarray(box_ops.anchor_grid(*canvas, grid))
    levels = box_ops.level_sizes(*canvas, grid)
    fixed = jax.lax.stop_gradient(regions)
    with jax.named_scope("proposal_scores"):
        scores = proposals.proposal_scores(
            fixed.embeddings,
            jax.lax.stop_gradient(concepts),
            pools,
            {"centerness": fixed.centerness, **fixed.proposal_logits},
            score=config.score,
            scale=model.scale(),
            bias=model.logit_bias[...],
        )
    # A box that reaches outside the image would be compared by pixels that do not exist, in NMS and
    # as the largest region.
    boxes = box_ops.clip(box_ops.decode_deltas(anchors, fixed.deltas), sizes)
    inside = box_ops.anchors_inside(anchors, sizes) & (box_ops.area(boxes) > 0)

    def select(
        box: Float[Array, "K 4"], score: Float[Array, " K"], mask: Bool[Array, " K"]
    ) -> tuple[Int[Array, " P"], Bool[Array, " P"]]:
        return nms.select_proposals(
            box, score, mask, levels,
            pre_nms_per_level=config.pre_nms_top_k, iou_threshold=config.nms_iou, k=config.k,
        )  # fmt: skip

    with jax.named_scope("nms"):
        indices, mask = jax.vmap(select)(boxes, scores, inside)
    areas = box_ops.area(jnp.take_along_axis(boxes, indices[..., None], axis=1))
    return Selection(indices, mask, areas)


def selected_embeddings(
    regions: detclip.RegionOutputs, selection: Selection
) -> Float[Array, "B P D"]:
    """Return the embeddings of the selected regions."""
    return jnp.take_along_axis(regions.embeddings, selection.indices[..., None], axis=1)


@jax.named_scope("contrastive_loss")
def contrastive_loss(
    scale: Float[Array, ""],
    features: Float[Array, "B P D"],
    selection: Selection,
    concepts: Float[Array, "M D"],
    texts: Int[Array, "B C"],
    config: LossConfig,
) -> Loss:
    """Return λ L_cts of a global batch from the features of its selected regions."""
    loss = contrastive.word_region_contrastive(
        features, selection.mask, selection.areas, concepts, texts, scale, config.word_region
    )
    return Loss(config.contrastive * loss, {"contrastive": loss})


def classification_loss(
    model: DetCLIP,
    batch: Batch,
    config: LossConfig,
    key: PRNGKeyArray | None,
    replicated: NamedSharding | None = None,
) -> Loss:
    """Return the loss λ L_cls of a batch of images with one class each (paper, appendix C).

    The arguments are those of `dense_loss`.
    """
    drop_path_factors = model.backbone.draw_drop_path(key, len(batch.images))
    regions = encode_images(model, batch, drop_path_factors, replicated)
    concepts = encode_concepts(model, batch.tokens, replicated)
    pools = concept_pools(batch, config)
    return loss_of_classes(
        model, regions, concepts, batch.token_mask, pools, batch.sizes, batch.texts,
        named_images(batch), batch.canvas, config,
    )  # fmt: skip


def named_images(batch: Batch) -> Float[Array, ""]:
    """Return how many images of a classification batch have a class name, at least 1."""
    return jnp.maximum((batch.texts[:, 0] >= 0).sum(), 1).astype(jnp.float32)


def loss_of_classes(
    model: DetCLIP,
    regions: detclip.RegionOutputs,
    concepts: Float[Array, "M D"],
    token_mask: Bool[Array, " M"],
    pools: Int[Array, "G N"],
    sizes: Int[Array, "B 2"],
    texts: Int[Array, "B 1"],
    images: Float[Array, ""],
    canvas: tuple[int, int],
    config: LossConfig,
) -> Loss:
    """Return the classification loss of some images of a global batch.

    The terms of all images of the batch add up to those of the batch. The class names of an image's
    group choose its regions; those of the whole step are the choices of the cross-entropy
    [inferred]: a full batch has nearly all names of ImageNet.

    Args:
      model: read for the anchors, the scale and the bias.
      regions: outputs for these images.
      concepts: features of the step's class names.
      token_mask: False for unused rows of the step's table.
      pools: the names that score each group of images (`concept_pools`).
      sizes: height and width of each image on the canvas, pixels.
      texts: the row of each image's own name; -1: an empty slot.
      images: `named_images` of the global batch.
      canvas: padded image size (height, width), pixels.
      config: weight of the loss, regions per image and their choice.
    """
    proposals = dataclasses.replace(config.proposals, k=config.classification_k)
    selection = select_regions(model, regions, concepts, pools, sizes, canvas, proposals)
    features = selected_embeddings(regions, selection)
    with jax.named_scope("classification_loss"):
        each = classification.class_cross_entropy(
            features, selection.mask, concepts, token_mask, texts[:, 0], model.scale()
        )
        loss = each.sum() / images
    return Loss(config.classification * loss, {"classification": loss, **regions.statistics})
