"""A checkpoint's model as files for other programs: one module a format."""
