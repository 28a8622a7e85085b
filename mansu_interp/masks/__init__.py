"""Which parameters may change, and to which values."""
