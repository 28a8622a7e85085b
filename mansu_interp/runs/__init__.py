"""One run end to end: its settings, folder, cost and report.

Public, from `mansu_interp`: RunConfig, default_config, make_mask, run. The rest is
implementation.
"""
