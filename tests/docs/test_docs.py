"""The documentation holds together: every link leads somewhere, and the API pages are built from the docstrings."""
# SPDX-License-Identifier: Apache-2.0

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OUTWARD = ("http://", "https://", "mailto:", "data:", "javascript:")


def anchors_of_markdown(text: str) -> set[str]:
    """The names of a page's headings, as the Hub's and most hosts' readers make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(page: Path, links: set[str], anchors: dict[Path, set[str]]) -> Iterator[str]:
    """Those of a page's links that lead to no file, or to a heading that is not in it."""
    for link in sorted(links):
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page.resolve()
        if not link.startswith(OUTWARD) and not (
            target.exists() and (not anchor or target not in anchors or anchor in anchors[target])
        ):
            yield f"{page.name}: {link}"


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    texts = {page.resolve(): page.read_text(encoding="utf-8") for page in PAGES}
    anchors = {page: anchors_of_markdown(text) for page, text in texts.items()}
    links = {page: set(LINK.findall(CODE.sub("", text))) for page, text in texts.items()}
    assert sum(map(len, links.values())) > 20
    assert [line for page in texts for line in broken(page, links[page], anchors)] == []


def test_a_broken_link_or_anchor_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three\n[a](page.md#one-two-three) [b](page.md#one) [c](none.md) [d](http://x)\n")
    links, anchors = set(LINK.findall(page.read_text())), {page: anchors_of_markdown(page.read_text())}
    assert list(broken(page, links, anchors)) == ["page.md: none.md", "page.md: page.md#one"]


@pytest.mark.slow
def test_the_api_pages_are_built_and_their_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts" / "build_docs.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.resolve(): Page(path) for path in tmp_path.rglob("*.html")}
    anchors = {path: page.anchors for path, page in pages.items()}
    assert [line for path, page in pages.items() for line in broken(path, page.links, anchors)] == []
    front = (tmp_path / "fedlora_hf.html").read_text()
    for name in ("FederatedConfig", "FederatedTrainer", "DirMagLoraConfig", "aggregate", "load_run"):
        assert f'id="{name}"' in front
    assert "Peak learning rate" in (tmp_path / "fedlora_hf" / "options.html").read_text()
    loaded = [link for page in pages.values() for link in page.links if link.startswith("http") and ".js" in link]
    assert loaded == []
    assert str(ROOT) not in "".join(path.read_text() for path in pages)
