"""StableHLO through `jax.export`: one file for CPU, CUDA and TPU, for batches of any size.

`jax.export.deserialize(file.read_bytes()).call(images, sizes)` needs JAX and nothing of this
package. JAX promises to read such a file for six months.
"""

import pathlib

import jax
from jax import export

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.exporters.served import ServedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def write(served: ServedModel, output: pathlib.Path, rows: int) -> dict[str, str]:
    """Writes the detector and, without a fixed vocabulary, the text encoder.

    `rows`: the names that the detector's input has room for. Returns the files by their role.
    """
    batch, count = (export.symbolic_shape(symbol)[0] for symbol in ("batch", "count"))
    arguments = served.image_spec(batch)
    if served.texts is not None:
        _write(output / "detector.stablehlo", served.answer(), *arguments)
        return {"detector": "detector.stablehlo"}
    _write(output / "detector.stablehlo", served.answer(), *arguments, served.text_spec(rows))
    _write(output / "text_encoder.stablehlo", served.encode(), served.token_spec(count))
    return {"detector": "detector.stablehlo", "text_encoder": "text_encoder.stablehlo"}


def _write(path: pathlib.Path, function, *arguments: jax.ShapeDtypeStruct) -> None:
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    with replacing(path) as temporary:
        temporary.write_bytes(exported.serialize())
