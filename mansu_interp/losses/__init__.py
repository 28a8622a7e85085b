"""Losses, gradients, Fisher information and accuracies, from logits.

No public names: implementation.
"""
