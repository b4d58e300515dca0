"""Boxes in, average precision out: numpy only."""
