"""Losses, gradients, Fisher information and accuracies, from logits."""
