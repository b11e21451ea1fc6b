"""Log-probs, entropies and divergences over a vocabulary sharded across ranks, which is never gathered."""
