"""Is the knowledge gone? Relearning, a suite of attacks, probes, stitching, linearized relearning,
CAD.

Public, from `mansu_interp`: RelearnConfig, Relearning, other_half, relearn, relearned,
AttackResults, attack_suite, CAD, judge_erasure. The rest is implementation.
"""
