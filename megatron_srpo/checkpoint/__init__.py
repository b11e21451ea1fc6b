"""Checkpoints: save a run's exact state during training; find, check and restore it on any layout."""
