"""Scores of several models, and the four properties.

Public, from `mansu_interp`: ModelVersion, Scores, evaluate, LeakTest, leak_test. The rest is
implementation.
"""
