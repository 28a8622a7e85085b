"""The edit as it is deployed: ledger, verification, GGUF.

No public names: implementation.
"""
