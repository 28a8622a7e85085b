"""How edges are drawn: one rule per class, for SVG and for graph.js.

Colours are the colour-blind safe set of Okabe and Ito, and never the only cue: a positive edge (it
supports the answer) is solid blue, a negative one (it opposes) dashed vermillion.
"""

from __future__ import annotations

EDGE_STYLES: dict[str, tuple[str, str, str]] = {
    "pos": ("#0072B2", "#4BA3DB", ""),
    "neg": ("#D55E00", "#EC7A24", "6 3"),
    "kept": ("#0072B2", "#4BA3DB", ""),
    "silent": ("#000000", "#F2F2F2", "1 4"),
    "weakened": ("#E69F00", "#E69F00", "6 3"),
    "recovered": ("#D55E00", "#EC7A24", "12 3"),
    "suppressed": ("#E69F00", "#E69F00", "6 3"),
    "erased": ("#000000", "#F2F2F2", "1 4"),
    "new": ("#CC79A7", "#CC79A7", "8 3 2 3"),
    "other": ("#8A9099", "#7A828C", ""),
    "quiet": ("#8A9099", "#7A828C", ""),
}
"""By class: light colour, dark colour, dash pattern."""
