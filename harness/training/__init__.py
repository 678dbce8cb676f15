"""The training of one run: step, loop, EMA, checkpoints, records on the way."""
