"""StableHLO through `jax.export`: one file for CPU, CUDA and TPU and for batches of any size.

`jax.export.deserialize(bytearray(content)).call(images, sizes)` runs it. That needs JAX, but not
this package. JAX promises to read such a file for six months.
"""

import pathlib

import jax
from jax import export

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.exporters.served import ServedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def write(served: ServedModel, output: pathlib.Path, rows: int) -> dict[str, str]:
    """Write the detector and, if names are an input, the text encoder.

    Args:
      served: the model.
      output: directory for the files.
      rows: the number of rows of the input `texts`, that is, the largest number of names.

    Returns:
      Role ('detector', 'text_encoder') -> file name.
    """
    batch, count = (export.symbolic_shape(symbol)[0] for symbol in ("batch", "count"))
    images = served.image_specs(batch)
    detect, encode = served.detect_function(), served.encode_function()
    if served.texts is not None:
        _write(output / "detector.stablehlo", detect, *images)
        return {"detector": "detector.stablehlo"}
    _write(output / "detector.stablehlo", detect, *images, served.text_spec(rows))
    _write(output / "text_encoder.stablehlo", encode, served.token_spec(count))
    return {"detector": "detector.stablehlo", "text_encoder": "text_encoder.stablehlo"}


def _write(path: pathlib.Path, function, *arguments: jax.ShapeDtypeStruct) -> None:
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    with replacing(path) as temporary:
        temporary.write_bytes(exported.serialize())
