"""Pure functions of arrays: no modules, no configs, no files."""
