"""Colours of every figure, one set for each background.

Okabe and Ito's first four, which every common form of colour blindness can tell apart, then indigo and brown in place
of the two that are too pale on white. Each has a contrast of at least 3:1 to its background (WCAG 2.2, 1.4.11); names
of curves are written in the colour of text.
"""

from __future__ import annotations

LIGHT_PAPER, DARK_PAPER = "#FFFFFF", "#14171B"
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#332288", "#5E3C00", "#1C2024")
DARK = ("#56B4E9", "#FF8A3D", "#3BCB9B", "#E39BC4", "#8C6BFF", "#FFE08A", "#F2F4F6")
PALE = "#CFE3F1"  # areas under dark text
