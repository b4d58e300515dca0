"""Readers of annotation formats: one module per format or published archive."""
