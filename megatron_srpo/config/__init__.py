"""The configuration: its schema, and loading it from YAML and the command line."""
