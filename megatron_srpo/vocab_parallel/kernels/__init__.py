"""Kernels that compute the statistics and logit gradients of one tile of tokens; `fused` chooses among them."""
