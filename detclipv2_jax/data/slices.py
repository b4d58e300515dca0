"""One process's slice of a step: read its records and make its batch.

A slot of the batch is one canvas. A *tile* is where one image goes: a whole canvas, or a quarter of
a mosaic. Below, b is the number of slots in the slice, p >= b the number of tiles, N the number of
boxes.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64

from detclipv2_jax.data import decoding
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import Plan, StepPlan
from detclipv2_jax.data.reader import RecordFiles
from detclipv2_jax.text import sides


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Where the images of a slice go. The first b tiles are those of slots 0 … b - 1, in order."""

    slot: Int[np.ndarray, " p"]  # the slot that each tile is on
    quarter: Int[np.ndarray, " p"]  # 0 … 3, row by row; 0 for a tile that is the whole canvas
    source: Int[np.ndarray, " p"]  # index into `all_sources` of the kind
    record: Int[np.ndarray, " p"]  # -1: an empty slot
    mosaic: Bool[np.ndarray, " b"]  # which slots are mosaics

    @classmethod
    def of(cls, plan: StepPlan, slots: slice) -> "Tiles":
        """Return the tiles of some slots of a step."""
        extra = plan.extra_records[slots]
        size = len(extra)
        owners, numbers = np.nonzero(extra >= 0)
        extra_sources = plan.extra_sources[slots][owners, numbers]
        return cls(
            slot=np.concatenate([np.arange(size), owners]),
            quarter=np.concatenate([np.zeros(size, np.int64), numbers + 1]),
            source=np.concatenate([plan.sources[slots], extra_sources]),
            record=np.concatenate([plan.records[slots], extra[owners, numbers]]),
            mosaic=(extra >= 0).any(axis=1),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """The record of each tile as it is stored, with what its index says about it."""

    serialized: list[bytes | None]  # None: an empty slot or unreadable
    heights: Int[np.ndarray, " p"]  # pixels
    widths: Int[np.ndarray, " p"]
    concepts: Int[np.ndarray, " p"]  # how many concepts the record has
    seeds: UInt64[np.ndarray, " p"]  # of its augmentation


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The records of this process's slots of a step, and what is done to their images."""

    plan: StepPlan
    texts: Int[np.ndarray, "b C"]
    scored: Bool[np.ndarray, "b M"]
    tiles: Tiles
    corners: Int[np.ndarray, "p 2"]  # (y, x) of each tile on its canvas, pixels
    serialized: list[bytes | None]  # as in `_Stored`
    concepts: Int[np.ndarray, " p"]
    placement: transforms_lib.Placement
    unflipped: int  # images that were drawn to be flipped, but have a text with left or right

    def undecoded(self) -> dict[str, np.ndarray]:
        """Return the readable records as `decoding.decoded_steps` expects them."""
        tiles = [tile for tile, record in enumerate(self.serialized) if record is not None]
        return {
            "tile": np.array(tiles, np.int32),
            "record": np.array([self.serialized[tile] for tile in tiles], object),
            "frame": self.placement.frames()[tiles],
            "concepts": self.concepts[tiles],
            "canvas": np.array(self.plan.shape, np.int32),
        }


class Decoded(NamedTuple):
    """What `decoding.decoded_steps` gives for a step: r <= p decoded records."""

    tile: Int[np.ndarray, " r"]
    image: UInt8[np.ndarray, "r H W 3"]
    boxes: Float[np.ndarray, "r N 4"]  # pixels of the stored image
    labels: Int[np.ndarray, "r N"]  # places among the record's concepts


class Unreadable(NamedTuple):
    """A record that became an empty slot."""

    source: str
    record: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ReadyBatch:
    """A batch with its plan, and counts of what happened to its data."""

    plan: StepPlan
    batch: Batch
    read: Mapping[str, int]  # records by source, the unreadable ones included
    unreadable: tuple[Unreadable, ...]
    cropped_boxes: int  # boxes of which augmentation left too little
    cut_boxes: int  # boxes beyond `max_boxes`
    unflipped: int  # as in `Slice`
    image_pixels: int  # of the canvases, covered by images
    canvas_pixels: int  # of all canvases, the empty ones included
    cut_labels: int  # labels of boxes beyond `labels_per_box`


class _Boxes(NamedTuple):
    """Boxes on canvases, N for each of n tiles or slots."""

    boxes: Float[np.ndarray, "n N 4"]  # (x_min, y_min, x_max, y_max), pixels of the canvas
    # Rows of the step's concept table, first ones first; -1 pads. None: no concept has a row.
    labels: Int[np.ndarray, "n N L"]
    kept: Bool[np.ndarray, "n N"]  # False: padding, or no box any more


class SliceReader:
    """Reads one process's slice of every step and makes batches of the decoded records."""

    def __init__(
        self,
        plan: Plan,
        sources: Mapping[str, Source],
        *,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self._kinds = plan.kinds
        self._vocabulary = plan.vocabulary
        self._sources = sources
        self._seed = seed
        self._process_index = process_index
        self._process_count = process_count
        self._files = RecordFiles(sources)

    def read(self, plan: StepPlan) -> Slice:
        """Read this process's records of a step and decide what is done to their images."""
        config = self._kinds[plan.kind]
        size = config.batch_size // self._process_count
        slots = slice(self._process_index * size, (self._process_index + 1) * size)
        tiles = Tiles.of(plan, slots)
        stored = self._stored(plan, tiles)
        half = np.array(plan.shape) // 2
        room = np.where(tiles.mosaic[tiles.slot, None], half, plan.shape)
        placement = transforms_lib.place(config, room, stored.heights, stored.widths, stored.seeds)
        drawn = placement.flip
        flip = drawn & ~self._names_a_side(config.all_sources, tiles, drawn)
        return Slice(
            plan=plan,
            texts=plan.texts[slots],
            scored=plan.scored[slots],
            tiles=tiles,
            corners=np.stack(np.divmod(tiles.quarter, 2), axis=1) * half,
            serialized=stored.serialized,
            concepts=stored.concepts,
            placement=dataclasses.replace(placement, flip=flip),
            unflipped=int(np.count_nonzero(drawn & ~flip & (tiles.record >= 0))),
        )

    def _names_a_side(
        self, names: Sequence[str], tiles: Tiles, asked: Bool[np.ndarray, " p"]
    ) -> Bool[np.ndarray, " p"]:
        """Return which of the asked tiles have a record with a concept that says left or right."""
        result = np.zeros(len(asked), bool)
        for number, name in enumerate(names):
            mine = np.flatnonzero(asked & (tiles.source == number) & (tiles.record >= 0))
            source, records = self._sources[name], tiles.record[mine]
            starts = source.positives_offsets[records]
            counts = source.positives_offsets[records + 1] - starts
            owners = np.repeat(np.arange(len(mine)), counts)
            firsts = np.cumsum(counts) - counts  # of each record, among the concepts of all
            places = np.arange(len(owners)) + (starts - firsts)[owners]
            named = sides.name_a_side(source.tokens[source.positives[places]])
            result[mine[owners[named]]] = True
        return result

    def _stored(self, plan: StepPlan, tiles: Tiles) -> _Stored:
        """Read the records of all tiles, source by source."""
        count = len(tiles.record)
        serialized: list[bytes | None] = [None] * count
        heights, widths, concepts = np.ones((3, count), np.int32)
        seeds = np.zeros(count, np.uint64)
        for number, name in enumerate(self._kinds[plan.kind].all_sources):
            mine = np.flatnonzero((tiles.source == number) & (tiles.record >= 0))
            source, records = self._sources[name], tiles.record[mine]
            heights[mine], widths[mine] = source.height[records], source.width[records]
            offsets = source.positives_offsets
            concepts[mine] = offsets[records + 1] - offsets[records]
            seeds[mine] = transforms_lib.seeds(
                self._seed, plan.epoch, name, records, plan.repetition
            )
            for tile, content in zip(mine, self._files.read(name, records)):
                serialized[tile] = content
        return _Stored(serialized, heights, widths, concepts, seeds)

    def assemble(self, slice_: Slice, decoded: Decoded) -> ReadyBatch:
        """Put decoded images into their slots, and boxes and labels into the step's terms."""
        plan, tiles, config = slice_.plan, slice_.tiles, self._kinds[slice_.plan.kind]
        is_decoded = np.zeros(len(tiles.record), bool)
        is_decoded[decoded.tile] = True
        is_filled = np.bincount(tiles.slot[is_decoded], minlength=len(tiles.mosaic)) > 0
        whole = slice_.placement.size[: len(tiles.mosaic)]
        sizes = np.where(tiles.mosaic[:, None], plan.shape, whole)
        named, cut_labels = self._named_boxes(slice_, decoded, is_decoded)
        placed = _by_slot(tiles, _on_canvas(slice_, named))
        largest = _largest(placed, config.max_boxes)
        batch = Batch(
            images=_images(slice_, decoded),
            sizes=np.where(is_filled[:, None], sizes, 0).astype(np.int32),
            boxes=largest.boxes,
            labels=largest.labels,
            scored=slice_.scored,
            texts=np.where(is_filled[:, None], slice_.texts, -1),
            tokens=self._vocabulary.tokens(plan.concepts, plan.kind, plan.bare),
            token_mask=plan.concepts >= 0,
            kind=plan.kind,
        )
        names = np.array(config.all_sources, object)[tiles.source]
        unreadable = np.flatnonzero(~is_decoded & (tiles.record >= 0))
        return ReadyBatch(
            plan=plan,
            batch=batch,
            read=collections.Counter(names[tiles.record >= 0].tolist()),
            unreadable=tuple(
                Unreadable(names[i], int(tiles.record[i]), decoding.explain(slice_.serialized[i]))
                for i in unreadable
            ),
            cropped_boxes=int(named.kept.sum() - placed.kept.sum()),
            cut_boxes=int(placed.kept.sum() - largest.kept.sum()),
            unflipped=slice_.unflipped,
            image_pixels=int(slice_.placement.size[is_decoded].prod(axis=1, dtype=np.int64).sum()),
            canvas_pixels=len(tiles.mosaic) * plan.shape[0] * plan.shape[1],
            cut_labels=cut_labels,
        )

    def _named_boxes(
        self, slice_: Slice, decoded: Decoded, is_decoded: Bool[np.ndarray, " p"]
    ) -> tuple[_Boxes, int]:
        """Return the stored boxes of each tile, labelled with rows of the step's concept table.

        Boxes with the same coordinates become one. Also returns how many labels had no room.
        """
        tiles, config = slice_.tiles, self._kinds[slice_.plan.kind]
        ids = np.full((len(is_decoded), decoded.labels.shape[1]), -1, np.int32)
        boxes = np.zeros((*ids.shape, 4), np.float32)
        ids[decoded.tile], boxes[decoded.tile] = decoded.labels, decoded.boxes
        for number, name in enumerate(config.all_sources):
            mine = np.flatnonzero(is_decoded & (tiles.source == number))
            source, to_global = self._sources[name], self._vocabulary.local_to_global[name]
            rows, places = np.nonzero(ids[mine] >= 0)
            rows = mine[rows]
            # A label is a place among its record's concepts, which the index lists in that order.
            starts = source.positives_offsets[tiles.record[rows]]
            ids[rows, places] = to_global[source.positives[starts + ids[rows, places]]]
        labels = slice_.plan.rows(ids.reshape(-1)).reshape(ids.shape)
        merged = merge_boxes(boxes, labels, ids >= 0, config.labels_per_box)
        return _Boxes(boxes, merged.labels, merged.kept), merged.cut


class Merged(NamedTuple):
    """Boxes after those with the same coordinates became one."""

    labels: Int[np.ndarray, "n N L"]  # the distinct labels of each box, first ones first; -1 pads
    kept: Bool[np.ndarray, "n N"]  # False also for a box that an earlier one stands for
    cut: int  # labels that had no room


def merge_boxes(
    boxes: Float[np.ndarray, "n N 4"],
    labels: Int[np.ndarray, "n N"],
    kept: Bool[np.ndarray, "n N"],
    labels_per_box: int,
) -> Merged:
    """Merge the boxes of an image that have the same coordinates, and collect their labels.

    Captions name an object twice ("a man", "the player"), and so do overlapping categories. Left
    apart, one of two equal boxes would get all anchors, and the other's name would be a negative.

    Args:
        boxes: of n images, pixels.
        labels: -1: none, which takes no room.
        kept: which of them are boxes.
        labels_per_box: room for the labels of a box (L).
    """
    images, places = np.nonzero(kept)
    groups, given = _same(images, boxes[images, places]), labels[images, places]
    _, first = np.unique(groups, return_index=True)
    is_first = np.zeros_like(kept)
    is_first[images[first], places[first]] = True
    # Each label of a group once, in the order of the boxes.
    found = np.flatnonzero(given >= 0)
    _, once = np.unique(np.stack([groups[found], given[found]]), axis=1, return_index=True)
    found = found[np.sort(once)]
    found = found[np.argsort(groups[found], kind="stable")]
    owners = groups[found]
    ranks = np.arange(len(found)) - np.searchsorted(owners, owners)
    has_room = ranks < labels_per_box
    result = np.full((*labels.shape, labels_per_box), -1, labels.dtype)
    at = first[owners[has_room]]
    result[images[at], places[at], ranks[has_room]] = given[found[has_room]]
    return Merged(result, is_first, int(np.count_nonzero(~has_room)))


_SAME = 0.1  # pixels of the stored image; annotations round, to two decimals or one [ours]


def _same(images: Int[np.ndarray, " k"], boxes: Float[np.ndarray, "k 4"]) -> Int[np.ndarray, " k"]:
    """Return the same number, from 0, for boxes of an image whose sides are within `_SAME`."""
    groups = images
    for side in range(4):
        # Sides of one image lie within 65,536 pixels, so those of two images never touch.
        values = images * 2.0**17 + boxes[:, side]
        order = np.argsort(values, kind="stable")
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.cumsum(np.diff(values[order], prepend=values[order][:1]) > _SAME)
        groups = np.unique(groups * (len(order) + 1) + ranks, return_inverse=True)[1]
    return groups


def _on_canvas(slice_: Slice, stored: _Boxes) -> _Boxes:
    """Move boxes from pixels of their stored images to pixels of their canvases."""
    boxes, kept = transforms_lib.move_boxes(slice_.placement, stored.boxes)
    kept &= stored.kept
    boxes += np.tile(slice_.corners[:, None, ::-1], 2) * kept[..., None]
    return _Boxes(boxes, stored.labels, kept)


def _by_slot(tiles: Tiles, boxes: _Boxes) -> _Boxes:
    """Turn N boxes per tile into 4 N per slot; into N where no slot is a mosaic."""
    if not tiles.mosaic.any():
        return boxes

    def of_slots(array: np.ndarray) -> np.ndarray:
        result = np.zeros((len(tiles.mosaic), 4, *array.shape[1:]), array.dtype)
        result[tiles.slot, tiles.quarter] = array
        return result.reshape(len(result), -1, *array.shape[2:])

    return _Boxes(*map(of_slots, boxes))


def _largest(placed: _Boxes, count: int) -> _Boxes:
    """Return the `count` largest boxes of each slot, largest first, padded with zeros and -1.

    A box without a label stays: the loss must know that an object is there.
    """
    sides = placed.boxes[..., 2:] - placed.boxes[..., :2]
    area = np.where(placed.kept, sides.prod(-1), -1)
    order = np.argsort(-area, axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(placed.kept, order, axis=1)
    boxes = np.take_along_axis(placed.boxes, order[..., None], axis=1)
    labels = np.take_along_axis(placed.labels, order[..., None], axis=1)
    labels = np.where(kept[..., None], labels, -1)
    padding = (0, 0), (0, count - order.shape[1])
    return _Boxes(
        boxes=np.pad(np.where(kept[..., None], boxes, 0), (*padding, (0, 0))),
        labels=np.pad(labels, (*padding, (0, 0)), constant_values=-1),
        kept=np.pad(kept, padding),
    )


def _images(slice_: Slice, decoded: Decoded) -> UInt8[np.ndarray, "b H W 3"]:
    """Return the canvases with the decoded images on them, each in the corner of its tile."""
    tiles = slice_.tiles
    if len(decoded.tile) == len(tiles.record) and not tiles.mosaic.any():
        return decoded.image
    images = np.zeros((len(tiles.mosaic), *slice_.plan.shape, 3), np.uint8)
    is_shared = tiles.mosaic[tiles.slot[decoded.tile]]
    images[tiles.slot[decoded.tile[~is_shared]]] = decoded.image[~is_shared]
    height, width = np.array(slice_.plan.shape) // 2
    for row in np.flatnonzero(is_shared):
        tile = decoded.tile[row]
        y, x = slice_.corners[tile]
        place = images[tiles.slot[tile], y : y + height, x : x + width]
        place[:] = decoded.image[row, :height, :width]
    return images
