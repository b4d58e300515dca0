"""The model as Flax modules: backbone, neck, head, text tower, and what describes them."""
