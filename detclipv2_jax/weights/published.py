"""Where to download the files of published weights that the shipped recipes name."""

from pathlib import Path

_SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
_CLIP = "https://openaipublic.azureedge.net/clip/models/"
URLS = {
    # The paper's Swin-T is pretrained on ImageNet; at 224 pixels on ImageNet-1k [inferred].
    "swin_tiny_patch4_window7_224.pth": _SWIN + "swin_tiny_patch4_window7_224.pth",
    # Window 12, at 384 pixels on ImageNet-22k [inferred: the detectors with Swin-L use it].
    "swin_large_patch4_window12_384_22k.pth": _SWIN + "swin_large_patch4_window12_384_22k.pth",
    # The folder is the SHA-256 of the file.
    "ViT-B-32.pt": _CLIP
    + "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
}


def how_to_get(path: str) -> str:
    """Return a sentence about where to get a file of weights that is missing."""
    url = URLS.get(Path(path).name)
    return f"Download it from {url} to this path." if url else "Check the path."
