"""Write the table of methods into README.md from the registry, between its two markers.

python scripts/update_readme.py
"""
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from fedlora_hf.aggregation import METHODS
from fedlora_hf.aggregation.method import Method

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def table() -> str:
    """The methods as Markdown, in the registry's order."""
    rows = ["| `--aggregation` | what it does | averages | robust | source |", "|---|---|---|---|---|"]
    rows += [_row(method) for method in METHODS.values()]
    return "\n".join(rows)


def _row(method: Method) -> str:
    robust = "yes" if method.robust else ""
    return f"| `{method.name}` | {method.title} | {method.averages} | {robust} | {method.paper} |"


def with_table(readme: str) -> str:
    """The README with the current table between the markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
