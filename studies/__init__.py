"""What a user runs: the command line, presets, single runs and comparisons."""
