"""Load a model; where its weights and hook points are; who writes and reads its stream.

Public, from `mansu_interp`: load_model, LanguageModel. The rest is implementation.
"""
