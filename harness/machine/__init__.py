"""The machine that runs all this: environment, processes, memory, disk, progress."""
