"""What every room uses: errors, atomic files, configs as dicts, processes, command lines, plots."""
