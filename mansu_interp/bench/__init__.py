"""Many runs side by side, at the same forgetting.

No public names: implementation.
"""
