"""Readers of the formats that people have: one file a source."""
