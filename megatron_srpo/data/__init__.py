"""Records of a training step, and their files on disk. No computation, no processes."""
