#!/usr/bin/env bash
# torch 2.13.0 (CPU build, x86-64): the last digit of an elementwise power depends on where the number stands in its
# tensor. A vector unit computes most of a tensor, and another routine the rest that does not fill a vector. So
# x[i] ** a and (x ** a)[i] can differ. Expected was the same number for the same input, whatever stands beside it.
#
# Why it matters here: clients whose parts are added up exactly, and nodes that compute a block of clients each, have to
# find the same number for a client in every block.
#
# Seen 2026-11-29: 5,987 of the numbers 1 to 10,000 have another float32 power of -0.35 in their place than alone; no
# reciprocal root (torch.rsqrt) has. perfedrec computes powers of degrees number by number (nn/propagation.py).
#
# Exits with 1 if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - << 'PYTHON'
import torch

torch.set_num_threads(1)
numbers = torch.arange(1, 10_001, dtype=torch.float32)
alone = numbers.split(1)


def differing(function):
    return int((function(numbers) != torch.cat([function(each) for each in alone])).sum())


powers, roots = differing(lambda x: x**-0.35), differing(torch.rsqrt)
print(f"torch {torch.__version__}: {powers} of 10,000 powers and {roots} reciprocal roots differ by their place")
assert powers > 0, "powers no longer depend on their place"
assert roots == 0, "reciprocal roots depend on their place now"
PYTHON
