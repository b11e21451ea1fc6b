"""The commands of `srpo`, one module each; only argument handling and printing belong here.

A module offers `HELP`, `add_arguments(parser)` and `run(arguments)`, which returns the exit status. All$
modules are imported for `--help`: what needs torch is imported inside `run`.
"""
