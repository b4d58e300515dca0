"""Published weights: Swin backbones trained on ImageNet and CLIP's text towers, in all layouts.

`files.py` reads tensors by name. `swin.py` and `clip.py` list each publisher's names. `convert.py`
converts tensors to the model's parameters. `text_embedder.py` runs a text tower alone.
"""
