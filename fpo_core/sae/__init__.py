"""Sparse autoencoders: loading, encoding, training, and how good they are."""
