"""What engines of HTTP servers share: processes, health, restarts, quarantine, load balancing, retries."""
