"""Provide a small valid configuration as YAML text."""

GOOD = """\
model:
  hf_path: some/folder
train:
  steps: 3
logging:
  dir: runs/first
"""
