"""The training loop (start at train.py) and what it uses."""
