"""Pictures: layouts and static, self-contained SVG."""

from __future__ import annotations

from .layout import Box, Layout, place
from .svg import circuit_svg, curve_svg, escape

__all__ = ["Box", "Layout", "circuit_svg", "curve_svg", "escape", "place"]
