"""Prints requirements.lock: the exact versions in this environment, CUDA packages marked for the platform that has them."""

import importlib.metadata
import sys

CUDA = ("nvidia-", "cuda-", "triton")
LEFT_OUT = {"gossamer", "pip", "setuptools"}

lines = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.metadata["Name"].lower() not in LEFT_OUT}
sys.stdout.write("# Exact versions of everything that make installs (with --no-deps: this list is complete). Regenerate with: make lock\n")
for line in sorted(lines, key=str.lower):
    marker = ' ; platform_system == "Linux" and platform_machine == "x86_64"' if line.lower().startswith(CUDA) else ""
    sys.stdout.write(line + marker + "\n")
