"""Shared by engines with HTTP servers: processes, health, restarts, quarantine, load balancing, retries."""
