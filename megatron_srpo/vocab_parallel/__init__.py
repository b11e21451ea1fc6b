"""Log-probabilities, entropies and divergences over a vocabulary split across ranks, without ever gathering
it.
"""
