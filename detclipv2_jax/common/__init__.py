"""Shared by all rooms: errors, atomic writes, configs, processes, commands, plots."""
