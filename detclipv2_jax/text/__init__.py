"""Tokens of texts, definitions from WordNet, noun phrases of captions. No JAX, no TensorFlow."""
