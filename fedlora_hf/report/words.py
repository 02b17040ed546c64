"""The report in words: verdict, reasons, diagnosis, and numbers as people read them."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Mapping, Sequence

from fedlora_hf.report.view import COLLABORATIVE, FLAGGED, QUARANTINED, Client, Run, mapping, number, values

KIND_TITLES = {
    "subspace": "subspace: how much of the update lies outside what the other clients share",
    "direction": "direction: how far the update points away from the other clients",
    "scale": "scale: how far the size of the update is from the other clients' sizes",
    "functional": "functional: how much of what the round gives other clients' validation data the update takes",
}
EFFECT = "{effect}"  # where `effect_of` is put
_KIND_REASONS = {
    "subspace": "too much of its update lies outside the subspace the others share",
    "direction": "its update points away from the others",
    "scale": "its update is far larger or smaller than the others'",
    "functional": f"its update {EFFECT}",
}
# What is said beside "nobody was flagged": attacks that leave updates as honest ones are.
UNSEEN = (
    "Evidence on updates cannot see an honest update with a part of a wrong one mixed in, small changes that look like "
    "those of the others, or a majority that is wrong in one module or as a whole."
)
_KEPT_ALL = 0.995  # influence that rounds to all of it
# Of a client close to the line.
_KIND_NEAR = {
    "subspace": "has much of its update outside what the others share",
    "direction": "stands far from the rest in the direction of its update",
    "scale": "stands far from the rest in the size of its update",
    "functional": EFFECT,
}
METRICS = {
    "loss": "how much the right answers surprise the model",
    "perplexity": "among how many words the model hesitates",
    "accuracy": "the share of right answers",
    "token_accuracy": "the share of the answers' words and word parts that the model has right",
    "exact_match": "the share of generated answers that are an accepted one, but for case and punctuation",
    "rouge_l": "how far generated answers agree with the right ones, 0 to 1",
}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_MOST_REHEARSED = 6
_LONGEST = 600  # characters of untrusted text worth showing


def figure_of(value: float | None, digits: int = 4) -> str:
    """A number to four significant digits; a dash for one that was not recorded."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def byte_unit(largest: float) -> tuple[float, str]:
    """(divisor, unit) in which `largest` bytes has at most four digits before the point."""
    power = 0
    while largest >= 1024 and power < len(_UNITS) - 1:
        largest, power = largest / 1024, power + 1
    return 1024.0**power, _UNITS[power]


def bytes_of(value: float | None) -> str:
    if value is None:
        return "–"
    divisor, unit = byte_unit(value)
    return f"{value / divisor:.{0 if divisor == 1 else 1}f} {unit}"


def seconds_of(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def counted(number_of: int, noun: str) -> str:
    return f"{number_of:,} {noun}" if number_of == 1 else f"{number_of:,} {noun}s"


def shortened(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def rehearsal(run: Run) -> str:
    """A sentence where clients were contaminated on purpose (--contaminate): who, how, and what came of it."""
    clients = [client for client in run.clients if client.contaminated]
    if not clients:
        return ""
    named = ", ".join(f"{shortened(c.title)} ({c.contaminated}; {c.state})" for c in clients[:_MOST_REHEARSED])
    more = len(clients) - _MOST_REHEARSED
    were = "was" if len(clients) == 1 else "were"
    return (
        f"This is a rehearsal: {counted(len(clients), 'client')} {were} contaminated on purpose by "
        f"--contaminate, {named}{f' and {more} more' if more > 0 else ''}."
    )


def verdict(run: Run) -> str:
    """How many took part, how many were flagged and quarantined, and of whom the global adapter was made."""
    flagged, quarantined = len(run.having(FLAGGED)), len(run.having(QUARANTINED))
    if not run.clients:
        return "The record names no clients."
    outcome = []
    if flagged:
        outcome.append(f"{flagged} {'was' if flagged == 1 else 'were'} flagged as contaminated")
    if quarantined:
        outcome.append(f"{quarantined} {'was' if quarantined == 1 else 'were'} quarantined as unusable")
    if not outcome:
        judged = any(client.evidence for client in run.clients)
        said = "none was flagged, none quarantined" if judged else "none was quarantined; the method flags nobody"
        return f"Of {counted(len(run.clients), 'client')}, {said}."
    rest = len(run.having(COLLABORATIVE))
    made = f" The global adapter was made from the updates of the other {rest:,}." if rest else ""
    return f"Of {counted(len(run.clients), 'client')}, {' and '.join(outcome)}.{made}"


def reason_of(run: Run, client: Client) -> str:
    """Why a client was flagged: the kinds of evidence above their thresholds, or the rounds that flagged it."""
    parts = []
    for kind in run.kinds:
        score = client.evidence.get(kind)
        if score is not None and score.above:
            words = _KIND_REASONS.get(kind, f"its {shortened(kind)} score is too high")
            words = words.replace(EFFECT, effect_of(client.effect))
            parts.append(
                f"{words} ({shortened(kind)} {figure_of(score.score, 3)}, threshold {figure_of(score.threshold, 3)})"
            )
    if parts:
        return "; ".join(parts)
    earlier = [str(entry.number) for entry in run.rounds if client.id in entry.flagged]
    if earlier:
        rounds = ", ".join(earlier)
        return f"flagged in round {rounds}; its average over the rounds is still above half of the threshold"
    return "the record holds no score of it above a threshold"


def suspicion_of(client: Client) -> str:
    """Why a client is close to the line, how close, what it counted, and what would decide it."""
    kind, share = client.suspicion or ("", 0.0)
    if kind == "drift":
        said = ["turned away from where it pointed in earlier rounds, which alone flags nobody"]
    else:
        apart = _KIND_NEAR.get(kind, f"has a high {shortened(kind)} score").replace(EFFECT, effect_of(client.effect))
        alone = " in its last round alone" if share >= 1 else ""
        said = [f"{apart}: {figure_of(share, 2) if share >= 10 else f'{share:.2f}'} of 1.00{alone}, not enough to flag"]
    if kept := kept_of(client):
        said.append(kept)
    if "functional" in client.evidence:
        said.append("more rounds would decide it")
    else:
        said.append("--functional_judges would look at it with others' data, and more rounds would tell more")
    return "; ".join(said)


def effect_of(effect: tuple[int, int, float] | None) -> str:
    """ "raises the loss of 7 of 9 others by 1.4 % (median)", in the last round; in general terms where no others were
    counted."""
    if effect is None:
        return "raises the loss on other clients' validation data"
    raised, judges, change = effect
    verb = "raises" if change >= 0 else "lowers"
    count = raised if change >= 0 else judges - raised
    return f"{verb} the loss of {count:,} of {judges:,} others by {percent_of(abs(change))} (median)"


def percent_of(share: float) -> str:
    """1.4 % and 0.3 %, and from 100 % on whole ones."""
    return f"{100 * share:,.0f} %" if share >= 1 else f"{100 * share:.1f} %"


def kept_of(client: Client) -> str:
    """ "kept 38 % of its influence", or "" for one that kept all of it, or of which nothing is known."""
    if client.influence is None or client.influence >= _KEPT_ALL:
        return ""
    return f"kept {100 * client.influence:.0f} % of its influence"


def unseen(run: Run) -> str:
    """What the evidence cannot see, where it flagged nobody; "" where it flagged somebody or there was none."""
    return UNSEEN if not run.having(FLAGGED) and any(client.evidence for client in run.clients) else ""


def judging(run: Run) -> str:
    """Who judged the last round's updates and at what cost, by tokens and by the clock; "" where nobody did."""
    entry = mapping(run.record.rounds[-1]) if run.record.rounds else {}
    found = mapping(entry.get("judging"))
    examples, cost = values(found.get("judges")), number(found.get("cost"))
    if not examples or cost is None:
        return ""
    seconds = values(entry.get("seconds"))
    judge, train = seconds.get("judge"), seconds.get("train")
    timed = f", {percent_of(judge / train)} of its time" if judge and train and train > 0 else ""
    return (
        f"Each update was tried on the validation data of {counted(len(examples), 'client')} "
        f"({counted(int(sum(examples.values())), 'example')}), at {percent_of(cost)} of the training's cost by "
        f"tokens{timed}."
    )


def plain_words(value: object) -> str:
    """Any JSON value as short text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not recorded"
    if isinstance(value, int | float):
        return figure_of(number(value))
    if isinstance(value, Mapping | Sequence) and not value:
        return "none"
    if isinstance(value, Mapping):
        return shortened(", ".join(f"{key}: {plain_words(item)}" for key, item in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return shortened(", ".join(plain_words(item) for item in value))
    return shortened(str(value))


def participation(run: Run) -> str:
    return f"{len(run.having(COLLABORATIVE)):,} of {len(run.clients):,}"
