"""The in-process engine: transformers' own model of the folder's architecture, on every rank."""
