"""Small chat templates of the kinds that tokenizers have, and chats of odd shapes; nothing downloaded."""
# SPDX-License-Identifier: Apache-2.0

import copy
from typing import Any

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As PLAIN, and says itself what the assistant generates: its words and the end of the turn.
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<eos>{% endgeneration %}\n{% else %}{{ m['content'] }}<eos>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Writes nothing after a turn.
OPEN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words the last answer otherwise than earlier ones, as templates of models that think do.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Roles must take turns.
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN


def turns(*said: str) -> list[dict[str, Any]]:
    """user, assistant, user ... say these texts; a text that begins with "S:" is the system's."""
    found: list[dict[str, Any]] = []
    for text in said:
        if text.startswith("S:"):
            found.append({"role": "system", "content": text[2:]})
        else:
            asked = not found or found[-1]["role"] != "user"
            found.append({"role": "user" if asked else "assistant", "content": text})
    return found


ODD_CHATS = [
    turns("Hello", "Hi."),
    turns("S:Be brief.", "Hello", "Hi.", "And?", "Nothing."),
    turns("a", "b", "c", "d", "e", "f"),
    turns(" spaces around ", " and in the answer "),
    turns("Привет, 東京 🚌", "Ça va 😀"),
    turns("", "an answer to nothing"),
    turns("a question without an answer", ""),
    turns("line\nbreaks\n\n", "here\ntoo\n"),
    turns("the same", "the same", "the same", "the same"),
    turns("<|assistant|> in the text", "user said <|user|>"),
    turns("S:", "a system that says nothing", "x" * 300),
]


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of the tokenizer that has this template."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    return chat
