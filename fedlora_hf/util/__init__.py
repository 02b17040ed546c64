"""Small helpers that know nothing of federations: disk, names, seeds, redaction, progress."""
# SPDX-License-Identifier: Apache-2.0
