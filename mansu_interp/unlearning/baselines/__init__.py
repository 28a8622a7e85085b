"""Baselines, which need no mask: one file a method and its variants."""
