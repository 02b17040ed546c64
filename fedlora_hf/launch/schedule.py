"""Who trains which client: a longest-first schedule over processes, the same on every process."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping


def shares(costs: Mapping[str, float], processes: int) -> list[list[str]]:
    """One list of client ids a process: the costliest client next, to the process with the least so far.

    Longest processing time first (Graham 1969): at most 4/3 of the best possible makespan. Ties go by id and by
    process number, so every process computes the same schedule without talking. Where processes are equally fast it is
    also who trains whom when each takes the next longest client as soon as it is free (`ClientTrainer.taken`).
    """
    loads = [0.0] * processes
    plan: list[list[str]] = [[] for _ in range(processes)]
    for client_id in sorted(costs, key=lambda client: (-costs[client], client)):
        process = min(range(processes), key=lambda number: (loads[number], number))
        loads[process] += costs[client_id]
        plan[process].append(client_id)
    return plan
