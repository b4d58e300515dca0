"""The model card, `README.md`, which describes an export to people and to model hubs."""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from detclipv2_jax.models.parameters import parameter_paths

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel

_LIBRARIES = {"savedmodel": "tensorflow", "onnx": "onnx"}  # Hugging Face's `library_name`
_RUNTIMES = {"stablehlo": "jax", "savedmodel": "tensorflow-cpu", "onnx": "onnxruntime"}


def render(
    loaded: "LoadedModel",
    about: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    license: str | None,
) -> str:
    """Return the card as Markdown with the YAML header that Hugging Face reads.

    Standard and fixed AP are two columns, because they cannot be compared.

    Args:
      loaded: the checkpoint.
      about: content of manifest.json.
      results: content of the run's results.json, if there is one.
      license: an identifier such as 'apache-2.0'.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    results = results or {}
    measures = {
        name: figures
        for name, figures in results.items()
        if isinstance(figures, Mapping) and isinstance(figures.get("AP"), float)
    }
    sizes = {path: value.size for path, value in parameter_paths(loaded.params).items()}
    text = sum(size for path, size in sizes.items() if path.startswith("text/"))
    packages = [_RUNTIMES.get(about["format"], ""), "numpy", "pillow"]
    if not about["names"]:
        packages.append("tokenizers")
    return environment.get_template("card.md.jinja").render(
        about=about,
        library=_LIBRARIES.get(about["format"], "jax"),
        license=license,
        packages=" ".join(packages),
        model=loaded.model.to_dict(),
        parameters={"all": sum(sizes.values()), "text": text},
        results=results,
        measures=measures,
        figures=dict.fromkeys(key for figures in measures.values() for key in figures),
        dataset=pathlib.Path(str(results.get("dataset"))).name,
        **_training(loaded),
    )


def _training(loaded: "LoadedModel") -> dict[str, Any]:
    """Return what the card says of the training: epochs, data and initial weights."""
    config = loaded.run
    files = {part: path for part, path in config.get("init", {}).items() if path}
    return {
        "epochs": config.get("train", {}).get("epochs"),
        "names": loaded.names,
        "definitions": loaded.definitions,
        "initial": ", ".join(f"`{pathlib.Path(p).name}` ({part})" for part, p in files.items()),
        "sources": _sources(loaded),
    }


def _sources(loaded: "LoadedModel") -> dict[str, list[str]] | None:
    """Return kind of data -> its sources and their records; None if that is not known.

    An old checkpoint knows only its config, which may name sources that did not exist.
    """
    if loaded.sources is not None:
        return {
            kind: [f"{name} ({count:,} records)" for name, count in sources.items()]
            for kind, sources in loaded.sources.items()
        }
    data = loaded.run.get("data", {})
    if data.get("skip_missing"):
        return None
    return {
        kind: [pathlib.PurePath(name).name for name in section["sources"]]
        for kind, section in data.items()
        if isinstance(section, Mapping) and section.get("sources")
    }
