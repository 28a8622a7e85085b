"""Pictures and views: layouts, static SVG, self-contained pages and the notebook widget."""

from __future__ import annotations

from .layout import Box, Layout, place
from .svg import circuit_svg, curve_svg, escape, lines_svg
from .view import View, circuit_view, erasure_view

__all__ = [
    "Box",
    "Layout",
    "View",
    "circuit_svg",
    "circuit_view",
    "curve_svg",
    "erasure_view",
    "escape",
    "lines_svg",
    "place",
]
