"""The sources as TensorFlow Datasets builders, for people who live with `tfds` and Apache Beam.

    tfds build --imports=detclipv2_jax.data.prepare.tfds_builders objects365 \
        --manual_dir=DIR --data_dir=DIR
    python scripts/prepare_data.py index --from=DIR/objects365/1.0.0

The second command adds what training needs beside the records; until then, and without it, the
dataset is one like any other: `tfds.data_source("objects365")`. TFDS reads ArrayRecord with
`as_data_source` alone; for `tfds.load` and its tf.data pipeline build with
`--file_format=tfrecord`, which training does not read. DIR is laid out as for prepare_data.py.

With Beam (`--beam_pipeline_options=runner=DirectRunner`, `DataflowRunner`, …) the parts of a source
are the elements. The annotations are read where the command runs and wait, cut into parts, in a
folder of the dataset's; the workers read these and the images, which must be reachable by the same
paths.

`scripts/prepare_data.py` writes the same records without Beam, on all cores of a machine. TFDS has
`coco` and `lvis` of its own, so ours are called `coco_boxes` and `lvis_boxes`.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from detclipv2_jax.data.prepare.examples import Archive, Drops, ImageFile, RawBox, RawExample
from detclipv2_jax.data.prepare.image_encoding import Options
from detclipv2_jax.data.prepare.prepare import PART_EXAMPLES, cut
from detclipv2_jax.data.prepare.registry import OF_KIND, SOURCES, ArchiveSource
from detclipv2_jax.data.prepare.shards import records_of
from detclipv2_jax.data.prepare.sources.img2dataset import ParquetImage
from detclipv2_jax.data.records import Record, features

_PARTS = "parts"  # folder in a dataset that is being built with Beam
_PLACES = {place.__name__: place for place in (ImageFile, ParquetImage)}
_OPTIONS = Options(jobs=1)


class _Source(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One of `archives.SOURCES`: the class says which."""

    VERSION = tfds.core.Version("1.0.0")
    SOURCE: ArchiveSource
    url_infos = {}  # nothing is downloaded: TFDS need not look for a list of checksums

    def __init__(self, *, file_format: str | None = None, **kwargs: Any):
        self._with_beam = False
        self._format = file_format or "array_record"
        super().__init__(file_format=file_format, **kwargs)

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802 - TFDS names it
        """What is asked for where --manual_dir is not there."""
        return f"{self.SOURCE.about}. docs/data.md tells where it comes from."

    def download_and_prepare(
        self, *, download_config=None, file_format: str | None = None, **kwargs: Any
    ) -> None:
        """As every builder's; with Beam where `download_config` names a runner or its options."""
        config = download_config or tfds.download.DownloadConfig()
        self._with_beam = (config.beam_runner, config.beam_options) != (None, None)
        super().download_and_prepare(
            download_config=config, file_format=file_format or self._format, **kwargs
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.SOURCE.about,
            features=features(),
            disable_shuffling=True,  # as the archive has them; training shuffles by its plan
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        archives = self.SOURCE.open_all(Path(dl_manager.manual_dir))
        names = itertools.chain.from_iterable(archive.names for archive in archives)
        self.info.metadata.update(kind=self.SOURCE.kind, names=list(names))
        if self._with_beam:
            return {"train": self._generate_with_beam(archives)}
        return {"train": self._generate_examples(archives)}

    def _generate_examples(self, archives: list[Archive]) -> Iterator[tuple[int, dict[str, Any]]]:
        kind, drops = self.SOURCE.kind, Drops()
        examples = itertools.chain.from_iterable(archive.examples for archive in archives)
        records = (record for _, record in records_of(examples, kind, _OPTIONS, drops))
        for number, record in enumerate(filter(None, records)):
            yield number, _fields(record)
        for archive in archives:
            drops.add(archive.drops)
        self.info.metadata.update(json.loads(json.dumps(vars(drops))))

    def _generate_with_beam(self, archives: list[Archive]):
        import apache_beam as beam

        kind, folder = self.SOURCE.kind, Path(self.data_path) / _PARTS
        folder.mkdir(parents=True)
        for number, examples in cut(archives, PART_EXAMPLES[kind]):
            (folder / f"{number:06d}.jsonl").write_text("\n".join(map(_line, examples)))
        drops = Drops()
        for archive in archives:
            drops.add(archive.drops)
        self.info.metadata.update(json.loads(json.dumps(vars(drops))))
        return (
            beam.Create(sorted(map(str, folder.iterdir())))
            | beam.Reshuffle()
            | beam.FlatMap(functools.partial(_part, kind=kind))
        )

    def _process_pipeline_result(self, pipeline_result) -> None:
        """Add what the workers counted to what the archives told."""
        for counter in pipeline_result.metrics().query()["counters"]:
            field, _, reason = counter.key.metric.name.partition("/")
            if counter.key.metric.namespace == __name__:
                counts = self.info.metadata[field]
                counts[reason] = counts.get(reason, 0) + counter.committed

    def _post_download_and_prepare_hook(self) -> None:
        (self.data_path / _PARTS).rmtree(missing_ok=True)


class Objects365(_Source):
    """Objects365, either release."""

    SOURCE = SOURCES["objects365"]


class Goldg(_Source):
    """GoldG: MDETR's files of Flickr30k and GQA."""

    SOURCE = SOURCES["goldg"]


class ConceptualCaptions(_Source):
    """Conceptual Captions, CC3M or CC12M."""

    SOURCE = SOURCES["conceptual_captions"]


class LvisBoxes(_Source):
    """LVIS v1's training boxes."""

    SOURCE = SOURCES["lvis"]


class Odinw(_Source):
    """The training sets of ODinW."""

    SOURCE = SOURCES["odinw"]


class CocoBoxes(_Source):
    """COCO's instances."""

    SOURCE = SOURCES["coco"]


class Custom(_Source):
    """A folder of yours: custom/detection, custom/grounding, custom/image_text."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=kind, description=source.about)
        for kind, source in OF_KIND.items()
    ]

    @property
    def SOURCE(self) -> ArchiveSource:  # noqa: N802
        """The config's."""
        return OF_KIND[self.builder_config.name]


def _fields(record: Record) -> dict[str, Any]:
    """A record as TFDS takes an example."""
    fields = dict(vars(record), concepts=list(record.concepts))
    return fields | {"labels": record.labels.astype(np.int64)}


def _part(path: str, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """What a Beam worker makes of a part; keys follow the order of the archive."""
    from apache_beam.metrics import Metrics

    lines = Path(path).read_text().splitlines()
    first, drops = int(Path(path).stem) * PART_EXAMPLES[kind], Drops()
    made = records_of(map(_example, lines), kind, _OPTIONS, drops)
    for number, (_, record) in enumerate(made, first):
        if record is not None:
            yield number, _fields(record)
    for field in ("dropped", "mended"):
        for reason, count in getattr(drops, field).items():
            Metrics.counter(__name__, f"{field}/{reason}").inc(count)


def _line(example: RawExample) -> str:
    """An example as a line of JSON."""
    place = {"place": type(example.image).__name__}
    return json.dumps(dataclasses.asdict(example) | place, default=str)


def _example(line: str) -> RawExample:
    """The inverse of `_line`."""
    fields = json.loads(line)
    image, place = fields["image"], _PLACES[fields.pop("place")]
    boxes = (RawBox(**box | {"xywh": tuple(box["xywh"])}) for box in fields["boxes"])
    size = fields["size"]
    return RawExample(
        **fields
        | {
            "image": place(**image | {"path": Path(image["path"])}),
            "size": size and tuple(size),
            "boxes": tuple(boxes),
        }
    )
