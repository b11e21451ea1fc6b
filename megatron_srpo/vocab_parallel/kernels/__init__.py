"""Kernels: the statistics of one tile of tokens, and the gradient with respect to its logits."""
