"""What engines of HTTP servers share: processes, health, restarts, quarantine, load balancing, retries.

Nothing here knows what a server is asked or answers; rollout/sglang and rollout/openai do.
"""
