"""The edit: MANSU, its ablations, and baselines behind one registry.

Public, from `mansu_interp`: Mansu, MethodConfig, get_method, Unlearned, unlearn. The rest is
implementation.
"""
