"""In whose words a model is trained and asked, ours or a chat template's; kept with the output."""
# SPDX-License-Identifier: Apache-2.0

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fedlora_hf.errors import ConfigError, one_line

# In the name of a model that was tuned to follow instructions: a word of its own, not part of one.
_TUNED = re.compile(r"(?i)(?<![a-z])(instruct|instruction|chat|sft|dpo|rlhf|it)(?![a-z])")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Wording:
    """template: the Jinja text that words chats, None for our own wording; origin: where it is from, as told.

    instructions: instruction schemas are worded by it too, as one user turn. all_turns: the loss is on every turn of
    the assistant's, not on the last alone.
    """

    template: str | None = None
    origin: str = "none"
    instructions: bool = False
    all_turns: bool = False

    @property
    def has_marks(self) -> bool:
        """Whether the template itself says which characters the assistant generates ({% generation %})."""
        return self.template is not None and bool(_MARKS.search(self.template))

    def facts(self, example: str | None = None) -> dict[str, Any]:
        """For the run record: enough to word a question as the examples were. example: the form of a prompt in our
        own wording, which says how without telling anybody's data."""
        if self.template is None:
            return {"chat_template": "none", "instructions": "own wording", "loss": "last assistant turn"} | (
                {"example": example} if example else {}
            )
        return {
            "chat_template": self.origin,
            "chat_template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "instructions": "chat template" if self.instructions else "own wording",
            "loss": "all assistant turns" if self.all_turns else "last assistant turn",
        }


def choose_wording(
    tokenizer: Any, chat_template: str = "auto", *, base: str | None = None, all_turns: bool = False
) -> Wording:
    """The wording that the option `chat_template` asks for.

    "none": our own. "auto": the tokenizer's template where it has one, for chats; for instruction schemas too where
    `base` (a name, or a folder with a card) says that the model was tuned for instructions. Otherwise a file of Jinja,
    for both. Raises ConfigError for a file that is none, and for `all_turns` without a template.
    """
    if chat_template == "none":
        wording = Wording()
    elif chat_template == "auto":
        own = template_of(tokenizer)
        wording = Wording() if own is None else Wording(own, "tokenizer", is_tuned(base), all_turns)
    else:
        wording = Wording(_read_template(chat_template), Path(chat_template).name, True, all_turns)
    if all_turns and wording.template is None:
        raise ConfigError(
            "assistant_only_loss: the loss on every assistant turn needs a chat template, and none is used; name one "
            "by --chat_template FILE, or leave it out (the last turn is learnt)"
        )
    return wording


def own_form(prompt: str) -> str:
    """The form of a prompt in our own wording, without what it says; "..." alone for one that was used as it was."""
    if prompt.startswith("Instruction:\n") and prompt.endswith("\n\nAnswer:\n"):
        return "Instruction:\n...\n\nAnswer:\n"
    return "User:\n...\n\nAssistant:\n" if prompt.endswith("\n\nAssistant:\n") else "..."


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template (of several, the one named default); None where it has none."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default")
    return own if isinstance(own, str) and own.strip() else None


def is_tuned(base: str | None) -> bool:
    """Whether the base's name, or the head of the card in its folder, says that it was tuned for instructions."""
    if not base:
        return False
    if _TUNED.search(Path(base).name):
        return True
    try:
        card = (Path(base) / "README.md").read_text(encoding="utf-8", errors="replace")[:4000]
    except OSError:
        return False
    titles = [line for line in card.splitlines() if line.startswith(("#", "model_name", "name:", "base_model"))]
    return any(_TUNED.search(line) for line in titles[:5])


def save_tokenizer(tokenizer: Any, wording: Wording, folder: str | Path) -> None:
    """Keep the tokenizer with what was trained by it, and in it the template whose words were used."""
    if not hasattr(tokenizer, "save_pretrained"):
        return
    if wording.template is not None and wording.template != template_of(tokenizer):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = wording.template
    tokenizer.save_pretrained(str(folder))


def _read_template(name: str) -> str:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        # The extensions that transformers compiles templates with, but for the mark of generated text.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ConfigError(
            f"chat_template={name!r}: {one_line(error, 120)}; must be auto, none, or a file with a Jinja chat template"
        ) from None
    return text
