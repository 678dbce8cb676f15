"""How well the hidden states of each block describe images."""
