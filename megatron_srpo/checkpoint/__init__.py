"""Saving a run's exact state during training; finding, checking and restoring it on any layout."""
