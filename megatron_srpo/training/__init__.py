"""One optimizer step: packing, pipeline schedule, routed loss, optimizer, teacher. No sampling."""
