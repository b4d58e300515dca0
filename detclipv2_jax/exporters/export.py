"""What `detclip export` does: writes a model, its manifest and its model card."""

import argparse
import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from detclipv2_jax.common import config_dict, digests
from detclipv2_jax.common.atomic import (
    replacing,
    replacing_directory,
    unfinished,
    write_json,
    write_text,
)
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.exporters import card, manifest, onnx, safetensors, saved_model, stablehlo
from detclipv2_jax.exporters.served import served_model
from detclipv2_jax.inference.names import names_from_flags
from detclipv2_jax.inference.threshold import threshold

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel

_STAGE = ".export.partial"  # in the output directory, while files are written
_LOWEST = 0.05
#: What an export may write into its output folder.
_FILES = (
    "model.safetensors", "detector.stablehlo", "detector.onnx", "saved_model", "text_encoder.onnx",
    "text_encoder.stablehlo", "tokenizer.json", "example.py", "manifest.json", "README.md",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write the export that the command line asks for, and print the size of each file.

    Raises:
      UserError: an option or the checkpoint is not valid, or a package is missing.
    """
    from detclipv2_jax.inference.checkpoint import load_model

    names, canvas = _names(args), _canvas(args.canvas)
    if args.rows < 1:
        raise UserError(f"--rows={args.rows} leaves no room for names. Give 1 or more.")
    if args.format == "safetensors" and (names or canvas):
        raise UserError(
            "--format=safetensors writes parameters, not a detector. Leave --names, --names_file "
            "and --canvas out, or choose another --format."
        )
    folder = OutputFolder(args.output)
    folder.check(_FILES)
    loaded = load_model(args.checkpoint, args.step)
    output = folder.path
    with guarded(folder), _staged(output) as stage:
        files = _write(args, loaded, names, canvas, stage)
    for file in dict.fromkeys(files.values()):
        size = sum(f.stat().st_size for f in (output / file, *(output / file).rglob("*")))
        print(f"{output / file}: step {loaded.step}, {size / 1e6:.1f} MB")


@contextlib.contextmanager
def _staged(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a directory whose files are moved to `output` if the block ends without an error.

    So an export that is killed, or finds the disk full, leaves what was there before: never a
    model of one checkpoint with the manifest of another. The manifest is moved last.

    Raises:
      UserError: a file cannot be written.
    """
    stage, is_new = output / _STAGE, not output.exists()
    with unfinished(stage):
        try:
            shutil.rmtree(stage, ignore_errors=True)  # left by a process that was killed
            yield stage
            for path in sorted(stage.iterdir(), key=lambda path: path.name == "manifest.json"):
                if path.is_dir():
                    with replacing_directory(output / path.name) as temporary:
                        temporary.rmdir()
                        path.rename(temporary)
                else:
                    with replacing(output / path.name) as temporary:
                        path.rename(temporary)
        except UserError as error:
            raise UserError(str(error).replace(str(stage), str(output))) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    output.rmdir()  # if it is empty


def _write(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    names: list[str] | None,
    canvas: tuple[int, int] | None,
    output: pathlib.Path,
) -> dict[str, str]:
    """Write all files of the export; return role -> file name."""
    chosen = threshold(args.score_threshold, loaded.threshold)
    if args.format == "safetensors":
        files = safetensors.write(loaded, output)
        description = {
            "format": args.format,
            "settings": config_dict.to_dict(loaded.detect),
            "names": loaded.names,
            "definitions": dict(loaded.definitions),
        }
    else:
        files, description = _write_detector(args, loaded, names, canvas, output)
    about = {
        "step": loaded.step,
        **description,
        "threshold": chosen.to_json(),
        "files": files,
        "versions": manifest.versions(args.format),
    }
    text = card.render(loaded, about, _results(args.checkpoint), args.license)
    write_text(output / "README.md", text)
    written = sorted(path for path in output.rglob("*") if path.is_file())
    about["sha256"] = {str(p.relative_to(output).as_posix()): digests.of_file(p) for p in written}
    write_json(output / "manifest.json", about)
    return files


def _write_detector(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    names: list[str] | None,
    canvas: tuple[int, int] | None,
    output: pathlib.Path,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write a detector and example.py.

    Returns:
      Role ('detector', 'text_encoder') -> file name, and the manifest.
    """
    served = served_model(
        loaded,
        names,
        canvas=canvas,
        score_threshold=_built_in_threshold(args.score_threshold, loaded),
        max_detections=args.max_detections,
        definitions=args.definitions,
    )
    rows: int | str = "rows"  # any number
    if args.format == "stablehlo":
        rows = args.rows
        files = stablehlo.write(served, output, rows)
    elif args.format == "savedmodel":
        files = saved_model.write(served, output)
    else:
        files = onnx.write(served, output)
    example = pathlib.Path(__file__).parent / "example.py"
    write_text(output / "example.py", example.read_text(encoding="utf-8"))
    if names is None:
        manifest.write_tokenizer(output / "tokenizer.json")
    return files, manifest.describe(served, args.format, rows)


def _built_in_threshold(given: float | None, loaded: "LoadedModel") -> float:
    """Return the threshold inside the file: low, so that users of the file can raise it."""
    own = threshold(given, loaded.threshold).score_threshold
    return own if given is not None else min(_LOWEST, own)


def _names(args: argparse.Namespace) -> list[str] | None:
    """Return the fixed names; None if names are an input of the detector."""
    if args.names is None and args.names_file is None:
        return None
    return names_from_flags(args.names, args.names_file)


def _canvas(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) from a text such as '800x1344'."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(32 <= int(side) <= 8192 for side in match.groups()):
        raise UserError(
            f"--canvas={text} is not valid. Give height x width in pixels, each from 32 to 8192, "
            "for example 800x1344."
        )
    return int(match[1]), int(match[2])


def _results(checkpoint: str) -> Mapping[str, Any] | None:
    """Return the results.json of the run; None if there is none."""
    root = pathlib.Path(checkpoint)
    for path in (root / "results.json", root.parent / "results.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found if isinstance(found, dict) else None
    return None
