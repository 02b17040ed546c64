"""A finished run in use: its adapters on their base, asked, evaluated on other data, merged into the base."""
# SPDX-License-Identifier: Apache-2.0
