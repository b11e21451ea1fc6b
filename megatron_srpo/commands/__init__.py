"""The commands of `srpo`, one module each. Only argument handling and printing belong here."""
