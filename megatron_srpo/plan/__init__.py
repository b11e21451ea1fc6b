"""The planner: memory, time and traffic of a run on paper, before a machine is asked for.

Pure functions; see `command.plan`.
"""
