"""Archives on disk to prepared records and their index, offline."""
