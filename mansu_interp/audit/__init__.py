"""Is the knowledge gone? Relearning, probes, stitching, linearized relearning, CAD.

Public, from `mansu_interp`: RelearnConfig, Relearning, other_half, relearn, relearned, CAD,
judge_erasure. The rest is implementation.
"""
