"""Shared by all rooms: errors, atomic writes, config conversion, processes, command lines, plots."""
