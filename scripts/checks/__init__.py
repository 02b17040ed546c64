"""Runs that are killed, starved or long, and a real deployment of Flower; each ends with an error where it must."""
# SPDX-License-Identifier: Apache-2.0
