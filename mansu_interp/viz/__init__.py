"""Pictures and views: layouts, static SVG, self-contained pages and the notebook widget.

Public, from `mansu_interp`: View, attribution_view, changes_view, circuit_view. The rest is
implementation.
"""
