"""The ``mansu`` command."""
