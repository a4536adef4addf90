"""Surgery: removed classes become edits, a smaller network, and its proof."""

from gossamer.surgery.cutting import Cut, cut, cut_once
from gossamer.surgery.proof import TOLERANCE, prove

__all__ = ["TOLERANCE", "Cut", "cut", "cut_once", "prove"]
