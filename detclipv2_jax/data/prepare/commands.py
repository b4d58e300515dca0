"""The commands of `detclip prepare`: prepare an archive, a folder of your own, the built-in data.

Each function prints what it did. All raise `UserError` for what the user can fix.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import counted, printable
from detclipv2_jax.data.prepare import inputs as inputs_lib
from detclipv2_jax.data.prepare import registry, validation
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare, remove_leftovers
from detclipv2_jax.data.prepare.registry import ArchiveSource
from detclipv2_jax.data.prepare.report import format_report
from detclipv2_jax.data.prepare.sources import lvis, symbols
from detclipv2_jax.text import phrases


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a source is written, and how."""

    to: Path  # directory of the source, or of several sources
    name: str | None = None  # of the source; None: the last part of `to`
    overwrite: bool = False  # replace a source that was made from other inputs
    options: PrepareOptions = PrepareOptions()


def prepare_archive(
    source: ArchiveSource,
    origin: Path,
    target: Target,
    *,
    annotations: Sequence[Path] | None = None,
    images: Path | None = None,
    reader_options: Mapping[str, Any] | None = None,
) -> None:
    """Prepare a published archive as one source.

    Args:
        source: one of `registry.SOURCES`.
        origin: folder of the archive.
        target: where to write.
        annotations: annotation files; None: those that are found in `origin`.
        images: folder of the images; None: `origin`/images, then `origin`.
        reader_options: options of `source.read`.
    """
    files = annotations or source.files(origin)
    name = target.name or target.to.name
    target = dataclasses.replace(target, name=name)
    _prepare_files(source, files, origin, target, images=images, reader_options=reader_options)


def prepare_folder(
    origin: Path,
    target: Target,
    *,
    annotations: Mapping[str, Sequence[Path]] | None = None,
    images: Path | None = None,
    validate_on: Path | validation.Split | None = None,
    find_validation: bool = True,
) -> None:
    """Prepare each kind of data that a folder has, as TO/KIND, and its validation set.

    Args:
        origin: the folder.
        target: where to write.
        annotations: annotation files by kind; if any are named, only these are prepared.
        images: folder of the images; None: `origin`/images, then `origin`.
        validate_on: the annotation file of the validation set, or how to hold out pictures for it.
        find_validation: without `validate_on`, take the file that the folder has, if it has one.
    """
    found = validation.find(origin) if find_validation else None
    trained = [path for paths in (annotations or {}).values() for path in _located(paths, origin)]
    if found in trained:  # somebody asked to train on it
        found = None
    if isinstance(validate_on, validation.Split) and found is not None:
        raise UserError(
            f"--val_share: {origin} has a file for validation, {found}. Leave --val_share out to "
            "use it, or add --validation=none to hold out pictures of the other files."
        )
    validate_on = validate_on or found
    used = (validate_on,) if isinstance(validate_on, Path) else ()
    files = annotations or registry.discover_and_report(origin, used)
    if not files:
        raise UserError(
            f"{origin}: no annotation file for training here or in annotations/. Give one with "
            "--detection=FILE, --grounding=FILE or --image_text=FILE."
        )
    if "image_text" in files:
        _check_phrases(target)
    split = validate_on if isinstance(validate_on, validation.Split) else None
    held_out = _prepare_validation(validate_on, files.get("detection", ()), origin, target, images)
    for kind, source in registry.OF_KIND.items():
        if kind in files:
            one = _of_kind(target, kind)
            _prepare_files(
                source, files[kind], origin, one, images=images, split=split, held_out=held_out
            )
        else:
            print(f"{kind}: no annotation file in {origin}")
    both = [target.to / kind for kind in ("detection", "grounding")]
    if validate_on is not None:
        trained_on = [path for path in both if path.name in files]
        _warn_of_validation(target.to / validation.FOLDER, trained_on, origin)
    if all(path.name in files for path in both) and (count := inputs_lib.in_common(both, origin)):
        print(f"detection and grounding have {count:,} pictures in common; each has its own boxes")


def _prepare_validation(
    validate_on: Path | validation.Split | None,
    files: Sequence[Path],
    origin: Path,
    target: Target,
    images: Path | None,
) -> frozenset[str] | None:
    """Write TO/validation, and return the keys of the pictures that are held out from training.

    Args:
        validate_on: the file of the set, or how to hold out pictures of `files`; None: no set.
        files: annotations of boxes for training.
        origin: folder of the files.
        target: where to write.
        images: folder of the images, if it was named.
    """
    to, source = target.to / validation.FOLDER, registry.OF_KIND["detection"]
    if isinstance(validate_on, Path):
        path = _located([validate_on], origin)[0]
        folder = ImageFolder(images) if images else validation.image_folder(path, origin)
        made_from = registry.fingerprint([path], folder, None)
        archives = [source.read(path, folder)]
        print(validation.write(to, archives, made_from, origin, overwrite=target.overwrite))
    elif validate_on is not None and files:
        files = _located(files, origin)
        folder = ImageFolder(images) if images else registry.image_folder(origin, "detection")
        read = lambda: [source.read(path, folder) for path in files]
        pictures = (one.image for archive in read() for one in archive.examples)
        held_out = validate_on.held_out(pictures)
        made_from = registry.fingerprint(files, folder, None)
        made_from["held_out"] = dataclasses.asdict(validate_on)
        print(
            validation.write(
                to, read(), made_from, origin, held_out=held_out, overwrite=target.overwrite
            )
        )
        return held_out
    elif files:
        print(
            "validation: none, so training will not measure itself. Name a file with "
            "--validation=FILE, or hold out a tenth of the pictures with --val_share=0.1"
        )
    return None


def prepare_symbols(target: Target, *, seed: int, settings: Sequence[str]) -> None:
    """Draw the built-in data as archives in TO/archives, and prepare each kind as TO/KIND.

    Args:
        target: where to write.
        seed: of the scenes.
        settings: "NAME=VALUE" of fields of `SymbolsOptions`.
    """
    _check_phrases(target)
    options, archives = parse_symbols_options(settings), target.to / "archives"
    archives.parent.mkdir(parents=True, exist_ok=True)
    symbols.generate(archives, seed=seed, processes=target.options.jobs, options=options)
    files = {
        "detection": "detection_train.json",
        "grounding": "grounding_train.json",
        "image_text": "image_text_train.jsonl",
    }
    for kind, file in files.items():
        path = archives / "annotations" / file
        _prepare_files(registry.OF_KIND[kind], [path], archives, _of_kind(target, kind))


def _check_phrases(target: Target) -> None:
    """Find out before the work on other kinds whether captions can be taken apart."""
    is_prepared = (target.to / "image_text" / "info.json").exists()
    if target.options.phrase_limit and not is_prepared:
        phrases.load(target.options.phrase_model)


def parse_symbols_options(settings: Sequence[str]) -> symbols.SymbolsOptions:
    """Return the SymbolsOptions of "NAME=VALUE" settings; a pair is written 24,64."""
    defaults, chosen = dataclasses.asdict(symbols.SymbolsOptions()), {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in defaults:
            raise UserError(
                f"--option={setting}: unknown option. Use one of {', '.join(defaults)}."
            )
        default = defaults[name]
        try:
            if isinstance(default, tuple):
                first, second = value.strip("()").split(",")
                chosen[name] = (type(default[0])(first), type(default[0])(second))
            else:
                chosen[name] = type(default)(value)
        except ValueError as error:
            raise UserError(
                f"--option={setting}: invalid value. Give one like the default, {default}."
            ) from error
    return symbols.SymbolsOptions(**chosen)


def add_index(dataset: Path, *, split: str, jobs: int) -> None:
    """Write the index of a dataset that TensorFlow Datasets built; see `tfds_index.add_index`."""
    from detclipv2_jax.data.prepare import tfds_index

    print(format_report(tfds_index.add_index(dataset, split=split, jobs=jobs)))


def write_minival(val: Path, to: Path) -> None:
    """Write LVIS minival, extracted from LVIS's val; see `lvis.write_minival`."""
    print(f"{to}: {lvis.write_minival(val, to):,} images")


def _of_kind(target: Target, kind: str) -> Target:
    """Return the target of one kind out of several."""
    name = f"{target.name or target.to.name}_{kind}"
    return dataclasses.replace(target, to=target.to / kind, name=name)


def _prepare_files(
    source: ArchiveSource,
    files: Sequence[Path],
    origin: Path,
    target: Target,
    *,
    images: Path | None = None,
    reader_options: Mapping[str, Any] | None = None,
    split: validation.Split | None = None,
    held_out: frozenset[str] | None = None,
) -> None:
    """Prepare annotation files as one source, unless that was done before.

    Pictures that are `held_out` by `split` are left out.
    """
    if not origin.is_dir():
        raise UserError(f"{origin}: no such directory. Check --from.")
    files = _located(files, origin)
    kind, reader_options = source.kind, dict(reader_options or {})
    folder = ImageFolder(first=[images]) if images else registry.image_folder(origin, kind)
    inputs = registry.fingerprint(files, folder, target.options if kind == "image_text" else None)
    if kind == "classification":
        inputs["store_side"] = target.options.store_side
    if reader_options:
        inputs["reader"] = {option: str(value) for option, value in reader_options.items()}
    if split is not None:
        inputs["held_out"] = dataclasses.asdict(split)
    existing = registry.prepared_before(target.to, inputs, overwrite=target.overwrite)
    if existing is not None:
        remove_leftovers(target.to, inputs)
        inputs_lib.refuse_changes(existing.directory, origin)
        print(f"{target.to}: already prepared, {len(existing):,} records of {kind}")
        if missing := existing.info["dropped"].get("images: missing"):
            print(f"  images that were missing and still are: {missing:,}")
        return
    archives = [source.read(path, folder, **reader_options) for path in files]
    if held_out is not None:
        archives = [validation.without(archive, held_out) for archive in archives]
    written = prepare(
        archives,
        target.to,
        name=target.name,
        inputs=inputs,
        origin=origin,
        options=target.options,
    )
    print(format_report(written))


def _warn_of_validation(to: Path, sources: Sequence[Path], origin: Path) -> None:
    """Warn if pictures of the validation set are trained on: its figures would be too good."""
    if found := inputs_lib.same_content(to, sources, origin):
        count = len({path for path, _ in found})
        path, other = map(printable, found[0])
        shown = path if path == other else f"{path}, which is the same picture as {other}"
        print(
            f"warning: {counted(count, 'picture')} for validation {'is' if count == 1 else 'are'} "
            f"also trained on, for example {shown}. The figures will be too good: take such "
            "pictures out of one of the files, or hold out others with --validation=none "
            "--val_share=0.1"
        )


def _located(files: Sequence[Path], origin: Path) -> list[Path]:
    """Return files that are named by their path, or relative to the archive or annotations/."""
    folders = (Path(), origin, origin / "annotations")
    return [next((f / file for f in folders if (f / file).exists()), file) for file in files]
