"""A checkpoint's model as files for other programs: one module per format."""
