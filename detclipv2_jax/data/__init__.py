"""From archives on disk to batches. The only room that imports TensorFlow, where it must."""
