"""Pictures and views: layouts, static SVG, self-contained pages and the notebook widget."""

from __future__ import annotations

from .data import GraphData
from .layout import Box, Layout, place
from .plots import lines_svg
from .svg import circuit_svg, curve_svg, escape
from .view import View, changes_view, circuit_view

__all__ = [
    "Box",
    "GraphData",
    "Layout",
    "View",
    "changes_view",
    "circuit_svg",
    "circuit_view",
    "curve_svg",
    "escape",
    "lines_svg",
    "place",
]
