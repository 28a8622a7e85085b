"""Scores of several models, and the four properties.

Public, from `mansu_interp`: ModelVersion, Scores, evaluate. The rest is implementation.
"""
