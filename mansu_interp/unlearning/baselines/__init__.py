"""Baselines that train all weights: one file a method."""
