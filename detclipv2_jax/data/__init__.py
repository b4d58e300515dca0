"""From archives on disk to batches. The only room that imports TensorFlow (and only inside pipeline, records, transforms)."""
