"""What everyone gained, in sentences: means of the first metric, how many do better, and who does worse."""
# SPDX-License-Identifier: Apache-2.0

from fedlora_hf.report.view import COLLABORATIVE, VIEWS, Client, Run, lower_is_better, metric_order
from fedlora_hf.report.words import METRICS, counted, figure_of, shortened

_MOST_NAMED = 5
_RIVALS = {"before": "with the base model", "local": "with training alone"}


def gains(run: Run) -> list[str]:
    """Sentences on the collaborative clients' own test data; [] where nothing was measured."""
    clients = run.having(COLLABORATIVE)
    recorded = metric_order(name for c in clients for view in VIEWS for name in c.metrics.get(view, {}))
    names = recorded or metric_order(name for view in ("global", "personalised") for name in run.metrics_after(view))
    if not names:
        return []
    metric = names[0]
    found = [_means(run, metric), *(_compared(clients, metric, rival) for rival in _RIVALS)]
    return [sentence for sentence in found if sentence]


def _means(run: Run, metric: str) -> str:
    """ "Mean loss went from 3.37 (base model) to 2.08 with the global adapter and 1.69 with personal adapters" """
    start, shared = run.before(metric), run.after("global", metric)
    own, alone = run.after("personalised", metric), run.after("local", metric)
    if shared is None and own is None:
        return ""
    parts = [f"{figure_of(shared, 3)} with the global adapter"] if shared is not None else []
    parts += [f"{figure_of(own, 3)} with personal adapters"] if own is not None else []
    parts += [f"{figure_of(alone, 3)} for those who train alone"] if alone is not None else []
    reached = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    begun = "" if start is None else f"{figure_of(start, 3)} with the base model; it is "
    better = f"{'lower' if lower_is_better(metric) else 'higher'} is better"
    meaning = f"{METRICS[metric]}; {better}" if metric in METRICS else better
    where = "the data that were given" if run.record.kind == "aggregate" else "the clients' own test data"
    return f"Mean {shortened(metric)} ({meaning}) on {where} was {begun}{reached}."


def _compared(clients: list[Client], metric: str, rival: str) -> str:
    """How many of those that have both numbers end better than `rival`, and the names of those that do not."""
    pairs = [
        (client, now, client.metrics[rival][metric])
        for client in clients
        if (now := _final(client, metric)) is not None and metric in client.metrics.get(rival, {})
    ]
    if not pairs:
        return ""
    sign = -1 if lower_is_better(metric) else 1
    worse = [(client, now, then) for client, now, then in pairs if sign * (now - then) < 0]
    better = sum(sign * (now - then) > 0 for _, now, then in pairs)
    said = f"{better} of {counted(len(pairs), 'client')} {'does' if better == 1 else 'do'} better than"
    if not worse:
        return f"{said} {_RIVALS[rival]}, and nobody does worse."
    named = ", ".join(
        f"{shortened(client.title)} ({figure_of(then, 3)} → {figure_of(now, 3)})"
        for client, now, then in worse[:_MOST_NAMED]
    )
    more = len(worse) - _MOST_NAMED
    return f"{said} {_RIVALS[rival]}; worse off: {named}{f' and {more} more' if more > 0 else ''}."


def _final(client: Client, metric: str) -> float | None:
    """The metric of the adapter that the client ends with: its personal one, or the global one."""
    found = client.metrics.get("personalised") or client.metrics.get("global") or {}
    return found.get(metric)
