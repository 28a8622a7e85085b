"""Scores of several models, and the four properties."""
