"""What a run tells: metrics.jsonl and all that is drawn from it, logs, alarms, the watchdog."""
