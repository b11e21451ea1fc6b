"""One optimizer step: packing, pipeline schedule, routed loss, optimizer, teacher.

Nothing here samples or verifies.
"""
