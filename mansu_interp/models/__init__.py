"""Load a model; where its weights and hook points are; who writes and reads its stream."""
