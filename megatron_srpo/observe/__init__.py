"""Observability of a run: metrics.jsonl and all that is drawn from it, logs, alarms, the watchdog."""
