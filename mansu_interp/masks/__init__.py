"""Which parameters may change, and to which values.

Public, from `mansu_interp`: Mask, circuit_mask. The rest is implementation.
"""
