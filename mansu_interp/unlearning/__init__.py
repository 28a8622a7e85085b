"""The edit: MANSU, its ablations, and baselines behind one registry."""
