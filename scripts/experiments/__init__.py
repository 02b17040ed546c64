"""What the methods find and what it is worth, on synthetic and real data; results go to docs/results."""
# SPDX-License-Identifier: Apache-2.0
