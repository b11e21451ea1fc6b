"""The planner: estimates of a run's memory, time and traffic, as pure functions; see `command.plan`."""
