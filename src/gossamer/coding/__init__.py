"""Lossless, entropy-coded weight files for networks whose weights are sparse, shared or integers."""

from gossamer.coding.coder import decode, encode
from gossamer.coding.files import read_state, save_coded
from gossamer.coding.size import Storage, storage

__all__ = ["Storage", "decode", "encode", "read_state", "save_coded", "storage"]
