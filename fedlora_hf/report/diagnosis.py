"""What the last aggregation found in the cohort as a whole: its sentences, and its numbers each with its meaning."""
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

from fedlora_hf.report.view import Run
from fedlora_hf.report.words import plain_words, shortened

MEANINGS = {
    "agreement": "How alike the updates of a majority are, as a cosine: 1 is the same direction, 0 unrelated.",
    "agreement_by_chance": "The agreement that as many unrelated clients would reach; above it they have something "
    "in common.",
    "opposition": "How strongly clients of the majority point against each other; 0 is not at all.",
    "shared_energy": "How much of its update a typical client that agrees with the others has in the subspace found in "
    "theirs, beyond what chance puts there.",
    "shared_energy_of_majority": "The same, as far as every client of a majority reaches it.",
    "common_use": "How alike a majority uses the shared subspace; near 0, each in its own way.",
    "direction_usable": "Whether the clients point one way clearly enough for one that does not to be told.",
    "subspace_usable": "Whether the clients share a subspace clearly enough for one outside it to be told.",
    "identifiable": "Whether contaminated clients can be told from honest ones by direction or subspace at all.",
    "weak_evidence": "Whether so few clients took part that the comparison between them says little.",
    "opposed_majority": "Whether clients that share a subspace point against each other, so that none is the odd one.",
    "flagged_agree": "Whether the flagged are alike among themselves: they collude, or are honest and different.",
    "copies": "Groups of clients that sent the same update; each group counts as one.",
    "modules_left_out": "Modules that not every client trained; they are not in the global adapter.",
    "num_contaminated": "The number of contaminated clients that the method was told to expect.",
    "num_selected": "The number of clients whose updates the method kept.",
    "krum_scores": "The distance of every client to its nearest others; the method keeps the lowest.",
}
_NO_MEANING = "A number of the method's own; its page in the documentation says what it is."


class Finding(NamedTuple):
    """One number of the diagnosis; meaning: a sentence."""

    name: str
    value: str
    meaning: str


def diagnosis(run: Run) -> tuple[list[str], list[Finding]]:
    """(sentences, findings): the last aggregation's diagnosis, text first, then its numbers."""
    sentences, findings = [], []
    for key in sorted(run.record.diagnosis, key=str):
        value = run.record.diagnosis[key]
        if isinstance(value, str) and " " in value.strip():
            text = shortened(value.strip())
            sentences.append(text[0].upper() + text[1:] + ("" if text[-1] in ".!?…" else "."))
        elif value not in ([], {}, None):
            name = shortened(str(key).replace("_", " "))
            findings.append(Finding(name, plain_words(value), MEANINGS.get(str(key), _NO_MEANING)))
    return sentences, findings
