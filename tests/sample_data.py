"""Generated records in the schemas of published instruction data, in our own words: small, learnable, never copied.

Every answer follows from its question by a rule, so that a model can learn them, and no two records are alike unless
duplicates are asked for.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import random
from collections.abc import Callable
from pathlib import Path

PLACES = ("harbour", "kitchen", "attic", "orchard", "library", "stable", "tower", "market", "cellar", "bakery")
THINGS = ("lantern", "kettle", "ladder", "basket", "violin", "compass", "blanket", "hammer", "teapot", "saddle")
COLOURS = ("red", "green", "blue", "white", "grey", "yellow", "brown", "purple")
NAMES = ("Ada", "Boris", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas")
ANIMALS = ("goat", "heron", "badger", "otter", "pony", "raven", "hare", "newt")
GOOD = ("kind", "splendid", "cheerful", "careful", "bright")
BAD = ("rude", "broken", "gloomy", "careless", "spoiled")

Record = dict[str, str]


def _facts(rng: random.Random) -> tuple[str, str, str, str]:
    return rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES), rng.choice(COLOURS)


def _story(rng: random.Random) -> tuple[str, tuple[str, str, str, str]]:
    name, thing, place, colour = _facts(rng)
    return f"{name} carried the {colour} {thing} to the {place} and paid {rng.randint(2, 99)} coins.", (
        name,
        thing,
        place,
        colour,
    )


def _open_qa(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(1, 60), rng.randint(1, 60)
    return f"How many coins are {a} coins and {b} coins?", "", f"{a + b} coins."


def _closed_qa(rng: random.Random) -> tuple[str, str, str]:
    story, (name, thing, place, _) = _story(rng)
    return f"Where did {name} carry the {thing}?", story, f"To the {place}."


def _classification(rng: random.Random) -> tuple[str, str, str]:
    words = [*rng.sample(ANIMALS, 2), *rng.sample(THINGS, 2)]
    rng.shuffle(words)
    return f"Which of these are animals: {', '.join(words)}?", "", ", ".join(w for w in words if w in ANIMALS) + "."


def _information_extraction(rng: random.Random) -> tuple[str, str, str]:
    story, (name, thing, _, colour) = _story(rng)
    return "List the person, the thing and its colour.", story, f"{name}, {thing}, {colour}."


def _summarization(rng: random.Random) -> tuple[str, str, str]:
    story, (name, thing, _, _) = _story(rng)
    return "Say in four words what happened.", story, f"{name} carried the {thing}."


def _brainstorming(rng: random.Random) -> tuple[str, str, str]:
    place, things = rng.choice(PLACES), rng.sample(THINGS, 3)
    start, end = things[0], rng.randint(2, 99)
    return (
        f"Name things for the {place}, from {start} to item {end}.",
        "",
        f"{start}, {', '.join(things[1:])}, item {end}.",
    )


def _creative_writing(rng: random.Random) -> tuple[str, str, str]:
    name, thing, place, colour = _facts(rng)
    about = f"{name}, the {colour} {thing} and the {place}"
    return f"Write a line about {about}.", "", f"{name} dreams of a {colour} {thing} in the {place}."


def _general_qa(rng: random.Random) -> tuple[str, str, str]:
    name, thing, place, colour = _facts(rng)
    return f"Why does {name} need a {colour} {thing} in the {place}?", "", f"Because every {place} needs a {thing}."


CATEGORIES: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "open_qa": _open_qa,
    "closed_qa": _closed_qa,
    "classification": _classification,
    "information_extraction": _information_extraction,
    "summarization": _summarization,
    "brainstorming": _brainstorming,
    "creative_writing": _creative_writing,
    "general_qa": _general_qa,
}


def dolly_records(n: int, seed: int = 0) -> list[Record]:
    """`n` distinct records with instruction, context, response and category, the categories in turn."""
    rng = random.Random(seed)
    names = list(CATEGORIES)
    records: dict[tuple[str, ...], Record] = {}
    while len(records) < n:
        category = names[len(records) % len(names)]
        instruction, context, response = CATEGORIES[category](rng)
        record = {"instruction": instruction, "context": context, "response": response, "category": category}
        records.setdefault((instruction, context), record)
    return list(records.values())


def write_dolly(path: Path, n: int, seed: int = 0, duplicates: int = 0) -> Path:
    """A .jsonl file of `n` distinct records in Dolly's schema and `duplicates` word for word repeats; its path."""
    records = dolly_records(n, seed)
    records += random.Random(seed + 1).sample(records, duplicates)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _words(rng: random.Random) -> list[str]:
    return rng.sample(THINGS + PLACES + ANIMALS + COLOURS, rng.randint(3, 6))


def _sum(rng: random.Random) -> tuple[str, list[str]]:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return f"{a} {b}", [str(a + b)]


def _mood(rng: random.Random) -> tuple[str, list[str]]:
    name, thing, place, colour = _facts(rng)
    good = rng.random() < 0.5
    text = f"{name} found the {colour} {thing} of the {place} {rng.choice(GOOD if good else BAD)}."
    return text, ["good" if good else "bad"]


def _on_words(rule: Callable[[list[str]], list[str]]) -> Callable[[random.Random], tuple[str, list[str]]]:
    def make(rng: random.Random) -> tuple[str, list[str]]:
        words = _words(rng)
        return " ".join(words), rule(words)

    return make


# name: (category, definition, instance maker)
TASKS: dict[str, tuple[str, str, Callable[[random.Random], tuple[str, list[str]]]]] = {
    "last_word": ("Word Choice", "You are given some words. Answer with the last one.", _on_words(lambda w: [w[-1]])),
    "reverse": (
        "Reordering",
        "You are given some words. Write them backwards.",
        _on_words(lambda w: [" ".join(w[::-1])]),
    ),
    "count": ("Counting", "You are given some words. Answer how many there are.", _on_words(lambda w: [str(len(w))])),
    "sort": (
        "Reordering",
        "You are given some words. Sort them by the alphabet.",
        _on_words(lambda w: [" ".join(sorted(w))]),
    ),
    "any_animal": (
        "Word Choice",
        "You are given some words. Answer with any animal among them, or none.",
        _on_words(lambda w: [x for x in w if x in ANIMALS] or ["none"]),
    ),
    "sum": ("Arithmetic", "You are given two numbers. Answer with their sum.", _sum),
    "mood": ("Sentiment", "You are given a sentence. Answer good or bad, as its last word is.", _mood),
    "upper": (
        "Spelling",
        "You are given some words. Write them in capitals.",
        _on_words(lambda w: [" ".join(w).upper()]),
    ),
}


def write_natural_instructions(folder: Path, tasks: int = 8, instances: int = 20, seed: int = 0) -> Path:
    """`tasks` files in the upstream schema of Natural Instructions, with distinct `instances` each; the folder.

    There are eight rules; further tasks use them again with other words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tasks):
        rule = list(TASKS)[number % len(TASKS)]
        name = f"task{number + 1:03d}_{rule}"
        content = _task(name, rule, instances, random.Random(f"{seed} {name}"))
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    return folder


def _task(name: str, rule: str, instances: int, rng: random.Random) -> dict[str, object]:
    category, definition, make = TASKS[rule]
    made: dict[str, list[str]] = {}
    while len(made) < instances:
        text, answers = make(rng)
        made.setdefault(text, answers)
    return {
        "Contributors": ["nobody"],
        "Source": ["generated"],
        "Categories": [category],
        "Definition": [definition],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Domains": ["Generated"],
        "Positive Examples": [],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{name}-{place:04d}", "input": text, "output": answers}
            for place, (text, answers) in enumerate(made.items())
        ],
        "Instance License": ["Apache 2.0"],
    }
