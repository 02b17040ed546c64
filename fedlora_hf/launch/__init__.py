"""How a run is launched: processes, their schedule, ZeRO, quantisation."""
# SPDX-License-Identifier: Apache-2.0
