"""Time and memory: of rounds, engines, processes, the arithmetic, a GPU; measured tables go to docs/benchmarks."""
# SPDX-License-Identifier: Apache-2.0
