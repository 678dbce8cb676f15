"""Networks that never learn: the autoencoder and the encoders, with the loading of their weights."""
