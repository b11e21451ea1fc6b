"""One training step after sampling: packing, pipeline schedule, routed loss, optimizer, teacher."""
