"""Prepares the reference packages; if one is missing, no test of this folder is collected."""

import importlib.util

PACKAGES = (
    "torch",
    "transformers",
    "timm",
    "open_clip",
    "mmengine",
    "mmcv",
    "mmdet",
    "instant_clip_tokenizer",
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING:
    collect_ignore_glob = ["test_*.py"]
else:
    import references  # noqa: F401
