"""The commands of `srpo`, one module each, for argument handling and printing only.

A module offers `HELP`, `add_arguments(parser)` and `run(arguments)`, which returns the exit status; `run`
imports what needs torch, as `--help` imports all modules.
"""
