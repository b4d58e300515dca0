"""The models that the shipped configs use. A config may change any field."""

from detclipv2_jax.models.atss_head import HeadConfig
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.models.text import TextConfig

# Yao et al. 2023, §4.1: Swin with window 7 (T) or 12 (L) and drop path 0.2, FPN and head of 256
# channels, the text tower of CLIP ViT-B. Embeddings have the 512 dimensions of CLIP's projection,
# which is trained; the paper's tower (FILIP's) has a trained projection too. Padding is
# masked [ours].
SWIN_T = DetCLIPConfig(
    swin=SwinConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window=7),
    mask_padding=True,
    dtype="bfloat16",
    remat="blocks",
)
SWIN_L = DetCLIPConfig(
    swin=SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window=12),
    mask_padding=True,
    dtype="bfloat16",
    remat="blocks",
    loop=True,
)
# The same parts, small enough for two CPU cores [ours]. The paper's towers are pretrained; this one
# trains from scratch and needs other initial values: docs/paper_vs_ours.md explains each of them.
NANO = DetCLIPConfig(
    swin=SwinConfig(
        embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window=4, drop_path=0.0
    ),
    neck_channels=64,
    neck_coarse_gain=0.1,
    head=HeadConfig(channels=64, convs=2, groups=8, embed_dim=64, branch_std=0.06),
    text=TextConfig(width=64, layers=2, heads=2, embed_dim=64, projection_gain=0.1),
    similarity="dot",
)
