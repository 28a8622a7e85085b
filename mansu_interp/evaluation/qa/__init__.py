"""Metrics of unlearning on questions and answers, and the taught models that they compare."""
