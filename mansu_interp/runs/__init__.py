"""One run end to end: its settings, folder, cost and report.

Public, from `mansu_interp`: RunConfig, run. The rest is implementation.
"""
