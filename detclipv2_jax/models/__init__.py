"""Flax modules: the detector, part by part."""
