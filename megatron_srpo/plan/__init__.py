"""The planner: memory, time and traffic of a run on paper, as pure functions; see `command.plan`."""
