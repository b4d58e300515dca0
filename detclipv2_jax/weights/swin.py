"""Layouts of Swin checkpoints: the official code, timm, Hugging Face and MMDetection.

All compute the same function. They differ in names, in the stage that holds a patch merging, in
whether query, key and value are one tensor, and (MMDetection) in the order of merged neighbors.
"""

import cv2
import numpy as np

from detclipv2_jax.weights.layouts import Convert, Layout, as_is, linear


def _patches(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return a (C, 3, p, p) convolution as a matrix of flattened patches (row, column, color)."""
    (kernel,) = tensors
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _bias_table(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return relative position biases, resampled to the window size of the model.

    A table is ((2W - 1)², heads). Each head's column is resampled as an image of 2W - 1 pixels per
    side by bicubic interpolation with half-pixel centers and a = -0.75, which equals the official
    code's `F.interpolate(mode="bicubic")`.
    """
    (table,) = tensors
    old, new = round(len(table) ** 0.5), round(shape[0] ** 0.5)
    if old == new or old * old != len(table):
        return table
    heads = [
        cv2.resize(head, (new, new), interpolation=cv2.INTER_CUBIC)
        for head in np.ascontiguousarray(table.T).reshape(-1, old, old)
    ]
    return np.stack(heads, axis=-1).reshape(new * new, -1)


def _merging(convert: Convert) -> Convert:
    """Return a conversion that reorders merged neighbors before `convert`.

    MMDetection orders them as `unfold` does: channel, row, column. Ours: column, row, channel.
    """

    def reorder_and_convert(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        (tensor,) = tensors
        parts = tensor.reshape(*tensor.shape[:-1], -1, 2, 2)
        parts = np.moveaxis(parts, (-3, -2, -1), (-1, -2, -3))
        return convert([parts.reshape(tensor.shape)], shape)

    return reorder_and_convert


# Our norms 0 to 2 follow the second to fourth stage, which other layouts number 1 to 3.
_STAGE_NORMS = ((r"^norms\.2", "norm3"), (r"^norms\.1", "norm2"), (r"^norms\.0", "norm1"))
_LEAVES = ((r"/", "."), (r"\.(kernel|scale)$", ".weight"))
_CONVERT = (
    (r"patch_embed/proj/kernel", _patches),
    (r".*/relative_position_bias_table", _bias_table),
    (r".*/kernel", linear),
    (r".*", as_is),
)
# Classifiers have no norms after the second and third stage. Their last norm has another name, and
# is tuned to a pooled feature. So a detector starts these norms as the identity.
_OPTIONAL = (r"norms/.*",)
_HUGGING_FACE = (
    *_LEAVES,
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^norms\.0", "hidden_states_norms.stage2"),
    (r"^norms\.1", "hidden_states_norms.stage3"),
    (r"^norms\.2", "hidden_states_norms.stage4"),
)
LAYOUTS = (
    # timm stores a merging with the stage that follows it, so only timm has one in layers.3.
    Layout(
        "timm",
        "layers.3.downsample.reduction.weight",
        (
            *_LEAVES,
            *((rf"^layers\.{i}\.down", f"layers.{i + 1}.down") for i in (2, 1, 0)),
        ),
        None,
        _CONVERT,
        _OPTIONAL,
    ),
    Layout(
        "the official code",
        "layers.0.blocks.0.attn.qkv.weight",
        (*_LEAVES, *_STAGE_NORMS),
        None,
        _CONVERT,
        _OPTIONAL,
    ),
    Layout(
        "MMDetection",
        "stages.0.blocks.0.attn.w_msa.qkv.weight",
        (
            *_LEAVES,
            (r"^patch_embed\.proj", "patch_embed.projection"),
            (r"^layers\.", "stages."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
            (r"\.mlp\.fc2\.", ".ffn.layers.1."),
            *_STAGE_NORMS,
        ),
        None,
        (
            (r".*/downsample/reduction/kernel", _merging(linear)),
            (r".*/downsample/norm/.*", _merging(as_is)),
            *_CONVERT,
        ),
        _OPTIONAL,
    ),
    Layout(
        "Hugging Face",
        "encoder.layers.0.blocks.0.attention.self.query.weight",
        (
            *_HUGGING_FACE,
            (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.attn\.rel", ".attention.self.rel"),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        ),
        (r"\.attn\.qkv\.", tuple(f".attention.self.{n}." for n in ("query", "key", "value"))),
        _CONVERT,
        _OPTIONAL,
    ),
    Layout(
        "Hugging Face (transformers 5)",
        "encoder.layers.0.blocks.0.attention.q_proj.weight",
        (
            *_HUGGING_FACE,
            (r"\.attn\.proj\.", ".attention.o_proj."),
            (r"\.attn\.rel", ".attention.relative_position_bias.rel"),
        ),
        (r"\.attn\.qkv\.", tuple(f".attention.{n}_proj." for n in "qkv")),
        _CONVERT,
        _OPTIONAL,
    ),
)
