"""Published weights in: ImageNet's Swin backbones and CLIP's text towers, in everyone's layout.

`initialize.py` puts files into a model's parameters; `swin.py` and `clip.py` know what each
publisher calls a parameter; `files.py` reads tensors and executes nothing.
"""
