"""Networks that predict the velocity: a noisy latent in, hidden states at taps out."""
