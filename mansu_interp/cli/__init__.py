"""The ``mansu`` command.

No public names: implementation.
"""
