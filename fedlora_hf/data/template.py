"""A chat in the words of a template, and which of its characters are learnt: those the assistant wrote."""
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import Any, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from fedlora_hf.data.turns import Turn, said
from fedlora_hf.data.wording import Wording
from fedlora_hf.errors import DataError, one_line

Spans = list[tuple[int, int]]
_PROBE = "Zwölf"


class Template:
    """One tokenizer's special tokens in one template.

    What is rendered begins and ends as the template says: no token is to be added when it is tokenised, except the
    end-of-sequence token after a chat whose last turn the template leaves open (`closes` is False).
    """

    def __init__(self, tokenizer: Any, wording: Wording) -> None:
        assert wording.template is not None
        self.text, self.wording = wording.template, wording
        self.specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.closes = self._closes()

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> str:
        """What the model is given before it answers: the turns and the opening of the assistant's."""
        return self._rendered(turns, tools, asked=True)[0]

    def chat(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None) -> tuple[str, Spans]:
        """(the whole chat, where in it stands what is learnt), by the template's own marks where it has them.

        The last turn is the assistant's. Without marks, what a turn adds to the opening of its answer is the turn's;
        where a template words earlier turns otherwise once later ones follow, the turn is looked for by what it says.
        Raises DataError for a chat that the template refuses, or in which a turn cannot be found again.
        """
        text, marked = self._rendered(turns, tools)
        last = _shared(self.prompt(turns[:-1], tools), text)
        if self.wording.has_marks:
            spans = [(start, end) for start, end in marked if self.wording.all_turns or end > last]
            return text, [(start if self.wording.all_turns else max(start, last), end) for start, end in spans]
        if not self.wording.all_turns:
            return text, [(last, len(text))]
        places = [place for place, turn in enumerate(turns[:-1]) if turn["role"] == "assistant"]
        spans = []
        for place in places:
            spans.append(self._span(text, turns, place, tools, spans[-1][1] if spans else 0))
        return text, [*spans, (last, len(text))]

    def _span(
        self, text: str, turns: Sequence[Turn], place: int, tools: Sequence[Any] | None, after: int
    ) -> tuple[int, int]:
        before, with_it = self.prompt(turns[:place], tools), self._rendered(turns[: place + 1], tools)[0]
        if with_it.startswith(before) and text.startswith(with_it):
            return len(before), len(with_it)
        content = said(turns[place]).strip()
        start = text.find(content, after)
        if start < 0 or not content:
            raise DataError(
                f"turn {place + 1} ({one_line(content, 40)!r}) is not found again in the chat template's wording; "
                "train on the last turn alone (leave out assistant_only_loss), or give a template with generation marks"
            )
        # With the turn's own end, as the template writes it after the same words.
        ending = with_it[with_it.rfind(content) + len(content) :]
        end = start + len(content)
        return start, end + _shared(ending, text[end:])

    def _closes(self) -> bool:
        try:
            text = self._rendered([{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}], None)[0]
        except DataError:
            return True
        return bool(text[text.rfind(_PROBE) + len(_PROBE) :].strip())

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Any] | None, asked: bool = False) -> tuple[str, Spans]:
        try:
            # Its annotation says text, and forgets the marks.
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                tools=list(tools) if tools else None,
                chat_template=self.text,
                return_assistant_tokens_mask=self.wording.has_marks,
                add_generation_prompt=asked,
                **cast(Any, self.specials),
            )
            texts, marks = rendered
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"the chat template refuses a chat of {', '.join(str(turn['role']) for turn in turns[:8])}: "
                f"{one_line(error, 120)}; correct or remove the record, or pass --chat_template none"
            ) from None
        return texts[0], [(int(start), int(end)) for start, end in (marks[0] if marks else [])]


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin alike with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def template_for(tokenizer: Any, wording: Wording | None) -> Template | None:
    """The template of a wording, None for our own words."""
    return None if wording is None or wording.template is None else Template(tokenizer, wording)
