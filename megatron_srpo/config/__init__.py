"""The configuration: its schema, and how it is loaded from YAML and the command line."""
