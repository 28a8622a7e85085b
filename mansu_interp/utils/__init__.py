"""Files, hub, optional packages, processes: knows nothing of models.

No public names: implementation.
"""
