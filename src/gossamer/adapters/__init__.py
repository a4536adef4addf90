"""What lets a module run at sizes its code does not foresee: rescaled numbers in calls, and an attention without tied sizes."""

from gossamer.adapters.attention import FreeMultiheadAttention, adapt_attention, free_attention, original_attention
from gossamer.adapters.numbers import NUMBERED, numbers_in, with_numbers
from gossamer.adapters.ordering import ChannelOrder, ChannelRepeat
from gossamer.adapters.rescaling import SCALE, rescale_calls, sets_scale

__all__ = [
    "NUMBERED",
    "SCALE",
    "ChannelOrder",
    "ChannelRepeat",
    "FreeMultiheadAttention",
    "adapt_attention",
    "free_attention",
    "numbers_in",
    "original_attention",
    "rescale_calls",
    "sets_scale",
    "with_numbers",
]
