"""TensorFlow Datasets builders of the sources, for users of `tfds` and Apache Beam.

    tfds build --imports=detclipv2_jax.data.prepare.tfds_builders objects365 \\
        --manual_dir=DIR --data_dir=DIR
    detclip prepare index --from=DIR/objects365/1.0.0

The second command adds what training needs in addition to the records. Without it the dataset is an
ordinary one: `tfds.data_source("objects365")`. TFDS reads ArrayRecord only with `as_data_source`.
For `tfds.load` and its tf.data pipeline, build with `--file_format=tfrecord`, which training cannot
read. DIR has the layout that `detclip prepare` expects.

With Beam (`--beam_pipeline_options=runner=DirectRunner`, `DataflowRunner`, …) each shard of a
source is one element. The annotations are read where the command runs and are stored, split into
shards, in a folder of the dataset. The workers read these files and the images, and need to reach
both by the same paths.

`detclip prepare` writes the same records without Beam, on all cores of one machine. TFDS has
builders called `coco` and `lvis`, so ours are called `coco_boxes` and `lvis_boxes`.
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

from detclipv2_jax.data.prepare.examples import Archive, Box, Drops, Example, ImageFile
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import SHARD_EXAMPLES, joined_meanings, split_into_shards
from detclipv2_jax.data.prepare.registry import OF_KIND, SOURCES, ArchiveSource
from detclipv2_jax.data.prepare.repeats import Distinct
from detclipv2_jax.data.prepare.shards import make_records
from detclipv2_jax.data.prepare.sources.img2dataset import ParquetImage
from detclipv2_jax.data.records import Record, features

_SHARDS = "shards"  # folder of examples in a dataset that is being built with Beam
_IMAGE_TYPES = {cls.__name__: cls for cls in (ImageFile, ParquetImage)}
_OPTIONS = PrepareOptions(jobs=1)


class _Source(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of one of `registry.SOURCES`; each subclass sets `SOURCE`."""

    VERSION = tfds.core.Version("1.0.0")
    SOURCE: ArchiveSource
    url_infos = {}  # nothing is downloaded, so TFDS does not look for a list of checksums

    def __init__(self, *, file_format: str | None = None, **kwargs: Any):
        self._with_beam = False
        self._format = file_format or "array_record"
        super().__init__(file_format=file_format, **kwargs)

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802 - the name that TFDS asks for
        """Return what TFDS prints where --manual_dir does not exist."""
        return f"{self.SOURCE.about}. See docs/data.md for where to get it."

    def download_and_prepare(
        self, *, download_config=None, file_format: str | None = None, **kwargs: Any
    ) -> None:
        """Build the dataset, with Beam if `download_config` names a runner or Beam options."""
        config = download_config or tfds.download.DownloadConfig()
        self._with_beam = (config.beam_runner, config.beam_options) != (None, None)
        super().download_and_prepare(
            download_config=config, file_format=file_format or self._format, **kwargs
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.SOURCE.about,
            features=features(),
            disable_shuffling=True,  # the order of the archive; training shuffles by its plan
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        archives = self.SOURCE.open_all(Path(dl_manager.manual_dir))
        names = itertools.chain.from_iterable(archive.names for archive in archives)
        self.info.metadata.update(
            kind=self.SOURCE.kind, names=list(names), meanings=joined_meanings(archives)
        )
        if self._with_beam:
            return {"train": self._generate_with_beam(archives)}
        return {"train": self._generate_examples(archives)}

    def _generate_examples(self, archives: list[Archive]) -> Iterator[tuple[int, dict[str, Any]]]:
        kind, drops = self.SOURCE.kind, Drops()
        records = (record for _, record in make_records(Distinct(archives), kind, _OPTIONS, drops))
        for number, record in enumerate(filter(None, records)):
            yield number, _to_fields(record)
        for archive in archives:
            drops.add(archive.drops)
        self.info.metadata.update(json.loads(json.dumps(drops.to_json())))

    def _generate_with_beam(self, archives: list[Archive]):
        import apache_beam as beam

        kind, folder = self.SOURCE.kind, Path(self.data_path) / _SHARDS
        folder.mkdir(parents=True)
        for number, examples in split_into_shards(archives, SHARD_EXAMPLES[kind]):
            (folder / f"{number:06d}.jsonl").write_text("\n".join(map(_to_line, examples)))
        drops = Drops()
        for archive in archives:
            drops.add(archive.drops)
        self.info.metadata.update(json.loads(json.dumps(drops.to_json())))
        return (
            beam.Create(sorted(map(str, folder.iterdir())))
            | beam.Reshuffle()
            | beam.FlatMap(functools.partial(_read_shard, kind=kind))
        )

    def _process_pipeline_result(self, pipeline_result) -> None:
        """Add the counts of the Beam workers to those of the archives."""
        for counter in pipeline_result.metrics().query()["counters"]:
            field, _, reason = counter.key.metric.name.partition("/")
            if counter.key.metric.namespace == __name__:
                counts = self.info.metadata[field]
                counts[reason] = counts.get(reason, 0) + counter.committed

    def _post_download_and_prepare_hook(self) -> None:
        (self.data_path / _SHARDS).rmtree(missing_ok=True)


class Objects365(_Source):
    """Objects365, v2 or v1."""

    SOURCE = SOURCES["objects365"]


class Goldg(_Source):
    """GoldG: MDETR's files of Flickr30k and GQA."""

    SOURCE = SOURCES["goldg"]


class ConceptualCaptions(_Source):
    """Conceptual Captions: CC3M or CC12M."""

    SOURCE = SOURCES["conceptual_captions"]


class Imagenet(_Source):
    """ImageNet-1k, with the names of its classes as texts."""

    SOURCE = SOURCES["imagenet"]


class LvisBoxes(_Source):
    """The training boxes of LVIS v1."""

    SOURCE = SOURCES["lvis"]


class Odinw(_Source):
    """The training sets of ODinW."""

    SOURCE = SOURCES["odinw"]


class CocoBoxes(_Source):
    """The instances of COCO."""

    SOURCE = SOURCES["coco"]


class Custom(_Source):
    """Your own folder: custom/detection, custom/grounding, custom/image_text."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=kind, description=source.about)
        for kind, source in OF_KIND.items()
    ]

    @property
    def SOURCE(self) -> ArchiveSource:  # noqa: N802
        """Return the source of the kind that the builder's config names."""
        return OF_KIND[self.builder_config.name]


def _to_fields(record: Record) -> dict[str, Any]:
    """Return a record as the dict that TFDS encodes."""
    fields = dict(vars(record), concepts=list(record.concepts))
    return fields | {"labels": record.labels.astype(np.int64)}


def _read_shard(path: str, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of one shard, in a Beam worker. Keys follow the order of the archive."""
    from apache_beam.metrics import Metrics

    lines = Path(path).read_text().splitlines()
    first, drops = int(Path(path).stem) * SHARD_EXAMPLES[kind], Drops()
    records = make_records(map(_from_line, lines), kind, _OPTIONS, drops)
    for number, (_, record) in enumerate(records, first):
        if record is not None:
            yield number, _to_fields(record)
    counts = drops.to_json()
    for field in ("dropped", "mended"):
        for reason, count in counts[field].items():
            Metrics.counter(__name__, f"{field}/{reason}").inc(count)


def _to_line(example: Example) -> str:
    """Return an example as one line of JSON."""
    image_type = {"image_type": type(example.image).__name__}
    return json.dumps(dataclasses.asdict(example) | image_type, default=str)


def _from_line(line: str) -> Example:
    """Return the example that `_to_line` wrote."""
    fields = json.loads(line)
    image, image_type = fields["image"], _IMAGE_TYPES[fields.pop("image_type")]
    boxes = (Box(**box | {"xywh": tuple(box["xywh"])}) for box in fields["boxes"])
    size, absent = fields["size"], fields["absent"]
    return Example(
        **fields
        | {
            "image": image_type(**image | {"path": Path(image["path"])}),
            "size": size and tuple(size),
            "boxes": tuple(boxes),
            "absent": None if absent is None else tuple(absent),
            "partial": tuple(fields["partial"]),
        }
    )
