"""Evaluation of a policy: sampling held-out questions, scores, comparison of results."""
