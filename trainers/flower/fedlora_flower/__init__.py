"""The two apps of the Flower project beside this folder."""
# SPDX-License-Identifier: Apache-2.0
