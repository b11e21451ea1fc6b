"""Rollouts: engines, collection of a step's groups, ledger, replay. Nothing here computes gradients."""
