"""Surgery: removed classes become edits, a smaller network, and its proof."""

from gossamer.surgery.cutting import Cut, cut
from gossamer.surgery.proof import TOLERANCE, prove

__all__ = ["TOLERANCE", "Cut", "cut", "prove"]
