"""CLAIR: shared subspace, contaminated clients and refined updates from clients' low-rank updates, in factor space.

Method: He, Chen, Feng 2026 (arXiv 2605.21217). What is the paper's and what is our choice: docs/clair.md.
"""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.methods.clair import ClairOptions
from fedlora_hf.numerics.clair.estimator import Solution, refined, solve
from fedlora_hf.numerics.clair.flagging import accumulate
from fedlora_hf.numerics.clair.model import Clair, ClairResult, LazyMapping, turned_back
from fedlora_hf.numerics.clair.source import Source

__all__ = [
    "Clair",
    "ClairOptions",
    "ClairResult",
    "LazyMapping",
    "Solution",
    "Source",
    "accumulate",
    "refined",
    "solve",
    "turned_back",
]
