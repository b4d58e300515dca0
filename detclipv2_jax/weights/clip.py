"""Layouts of CLIP text towers: OpenAI's checkpoints (also open_clip's) and Hugging Face's.

Of CLIP's 77 positions only the first `context` are loaded. CLIP's projection is loaded only if it
has the model's width; otherwise the projection trains from scratch.
"""

import numpy as np

from detclipv2_jax.weights.layouts import Layout, as_is, linear


def _positions(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the first of CLIP's positions."""
    (positions,) = tensors
    return positions[: shape[0]]


_LEAVES = ((r"/", "."), (r"\.(kernel|scale)$", ".weight"))
_CONVERT = (
    (r"positional_embedding", _positions),
    (r".*/kernel", linear),
    (r".*", as_is),
)
# CLIP's projection is 512 wide and the detector's is 256. Some files have no projection.
_OPTIONAL = (r"text_projection",)
LAYOUTS = (
    Layout(
        "Hugging Face",
        "embeddings.token_embedding.weight",
        (
            *_LEAVES,
            (r"^token_embedding$", "embeddings.token_embedding.weight"),
            (r"^positional_embedding$", "embeddings.position_embedding.weight"),
            (r"^text_projection$", "text_projection.weight"),
            (r"^resblocks\.", "encoder.layers."),
            (r"\.ln_1\.", ".layer_norm1."),
            (r"\.ln_2\.", ".layer_norm2."),
            (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
            (r"\.c_fc\.", ".fc1."),
            (r"\.c_proj\.", ".fc2."),
            (r"^ln_final\.", "final_layer_norm."),
        ),
        (r"\.attn\.in_proj\.", tuple(f".self_attn.{n}_proj." for n in "qkv")),
        ((r"text_projection", linear), *_CONVERT),
        _OPTIONAL,
    ),
    Layout(
        "OpenAI",
        "token_embedding.weight",
        (
            *_LEAVES,
            (r"^token_embedding$", "token_embedding.weight"),
            (r"^resblocks\.", "transformer.resblocks."),
            (r"\.in_proj\.", ".in_proj_"),
        ),
        None,
        _CONVERT,
        _OPTIONAL,
    ),
)
