"""The rounds: the store on disk, the rules of a federation, the output folder."""
# SPDX-License-Identifier: Apache-2.0
