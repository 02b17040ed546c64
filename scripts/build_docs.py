"""The pages of the API, made from the docstrings by pdoc: python scripts/build_docs.py [FOLDER], or build/docs."""
# SPDX-License-Identifier: Apache-2.0

import importlib
import pkgutil
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import pdoc

import fedlora_hf
from fedlora_hf.options import GROUPS

PROJECT = Path(__file__).resolve().parents[1]
HARMLESS = (
    ".* has already been added",  # a package without __all__ brings its modules along, and we name them too
    "Error parsing type annotation .*Phase|.*LoraConfig",  # fields inherited from PEFT, whose imports are not ours
    "Cannot determine where .*FoldedWeight",  # a torch.Tensor, built in C
)


PARAMETERS = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)


def modules() -> list[str]:
    """Every module of the package that can be imported here; those of an extra that is not installed are left out."""
    found = [fedlora_hf.__name__]
    for module in pkgutil.walk_packages(fedlora_hf.__path__, f"{fedlora_hf.__name__}.", onerror=lambda name: None):
        try:
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
                found.append(module.name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(fedlora_hf.__name__):
                raise
    return found


def describe_options() -> None:
    """Put the help of every option into its group's docstring, where pdoc looks."""
    for group in GROUPS:
        lines = [f"- **{item.name}** [{item.default}]: {item.metadata['help']}" for item in fields(group)]
        group.__doc__ = "\n".join([f"{str(group.__doc__).splitlines()[0]}. In brackets the default.", "", *lines])


@jinja2.pass_context
def to_markdown(context: Any, docstring: str) -> str:
    """Our docstrings are Markdown, but for the lines that explain a parameter: they become a list."""
    first = PARAMETERS.search(docstring)
    if first and not docstring[: first.start()].endswith("\n\n"):
        docstring = f"{docstring[: first.start()]}\n{docstring[first.start() :]}"
    return str(pdoc.render_helpers.to_markdown_with_context(context, PARAMETERS.sub(r"- **\1**: ", docstring)))


def build(folder: Path) -> list[Path]:
    """Write one page a module below `folder`, with a search and without a network; the pages.

    RuntimeError when pdoc cannot find or render something, where it would only warn.
    """
    names = modules()
    for name in names:
        module = importlib.import_module(name)
        # pdoc reads a module's dictionary: names that load on first use have to be there.
        vars(module).update({public: getattr(module, public) for public in getattr(module, "__all__", ())})
    describe_options()
    pdoc.render.env.filters["to_markdown"] = to_markdown
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="fedlora_hf, from its docstrings")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", harmless)
        pdoc.pdoc(*names, output_directory=folder)
    problems = [str(warning.message) for warning in said if "pdoc" in Path(warning.filename).parts]
    if problems:
        raise RuntimeError("\n".join(problems))
    pages = sorted(folder.rglob("*.html"))
    for page in pages:
        page.write_text(without_dead_links(page.read_text(encoding="utf-8")), encoding="utf-8")
    return pages


def without_dead_links(page: str) -> str:
    """pdoc links the names of inherited members too, which it does not show."""
    names = set(re.findall(r'id="([^"]+)"', page))
    return re.sub(r'<a href="#([^"]+)">([^<]*)</a>', lambda link: link[0] if link[1] in names else link[2], page)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "build" / "docs"
    pages = build(target)
    print(f"{len(pages)} pages; begin with {target / 'index.html'}")
