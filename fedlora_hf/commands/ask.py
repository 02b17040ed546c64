"""`fedlora ask`: a question to a finished run's adapters, in the words they were trained with."""
# SPDX-License-Identifier: Apache-2.0

import sys
from collections.abc import Sequence
from typing import Any

from fedlora_hf.options.facts import at_least, check_number
from fedlora_hf.using.asking import Question, ask, told_wording, wording_of_run
from fedlora_hf.using.finished import Finished
from fedlora_hf.using.loaded import load


def ask_run(
    folder: str,
    question: str,
    *,
    client: Sequence[str] = (),
    group: Sequence[str] = (),
    everything: bool = False,
    context: str = "",
    system: str = "",
    max_new_tokens: int = 64,
    base: str | None = None,
    use_cpu: bool = False,
    model_dtype: str | None = None,
) -> None:
    """Print the answer of the global adapter, of groups' and clients', or of all side by side; see `using.asking`."""
    check_number("max_new_tokens", max_new_tokens, int, at_least(1, "leave it out for 64"))
    run = Finished.read(folder)
    adapters = run.adapters(client, everything, group)
    changes: dict[str, Any] = {"use_cpu": use_cpu} | ({"model_dtype": model_dtype} if model_dtype else {})
    loaded = load(run, base, **changes)
    asked = Question(question, context, system)
    answers = ask(run, loaded, adapters, asked, max_new_tokens)
    if run.task_type == "CAUSAL_LM":
        print(told_wording(run, wording_of_run(run, loaded)), file=sys.stderr)  # noqa: T201
    for text in told(answers):
        print(text)  # noqa: T201


def told(answers: Sequence[tuple[str, str]]) -> list[str]:
    """One answer alone as it is; several each under whose it is."""
    if len(answers) == 1:
        return [answers[0][1] or "(no answer: the model ended at once)"]
    return [f"== {name}\n{answer or '(no answer: the model ended at once)'}\n" for name, answer in answers]
