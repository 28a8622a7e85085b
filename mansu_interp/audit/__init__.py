"""Is the knowledge gone? Relearning, probes, stitching, linearized relearning, CAD."""
