"""Circuits as other tools write and read them. `files` has the public functions."""
