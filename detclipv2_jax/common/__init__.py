"""Shared by all packages: errors, atomic writes, configs, processes, commands, plots."""
