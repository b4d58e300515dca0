"""From prepared records to batches: index, vocabulary, dictionary, plan, transforms, pipeline."""
