"""Losses over the vocabulary, with gradients and without, that never hold the logits of more than a chunk of tokens."""
