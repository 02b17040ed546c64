"""The page in a real browser: silent, in the reader's colours, within narrow windows, and open to everybody (axe).

Needs Chromium (or its path in PUPPETEER_EXECUTABLE_PATH) and, for axe, node with puppeteer-core and axe-core:
`npm install --prefix FOLDER puppeteer-core axe-core`, and NODE_PATH=FOLDER/node_modules.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
DRIVEN = os.environ.get("PUPPETEER_EXECUTABLE_PATH") or BROWSER
LOOK = Path(__file__).with_name("look.cjs")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--window-size=1000,1400",
)
PACKAGES = ("puppeteer-core", "axe-core")
DARK, LIGHT = 0, 1  # Blink's preferredColorScheme

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


def without_axe() -> str:
    """Why the page cannot be looked at by axe here, or ""."""
    if DRIVEN is None:
        return f"no browser: none of {', '.join(NAMES)}, no PUPPETEER_EXECUTABLE_PATH"
    if shutil.which("node") is None:
        return "no node"
    found = [
        subprocess.run(["node", "-e", f"require('{name}')"], check=False, capture_output=True) for name in PACKAGES
    ]
    missing = [name for name, done in zip(PACKAGES, found, strict=True) if done.returncode]
    return f"not on NODE_PATH: {', '.join(missing)}" if missing else ""


def looked_at(page: Path) -> list[dict[str, Any]]:
    """What look.cjs sees of a page, in three widths, light and dark."""
    if reason := without_axe():
        pytest.skip(reason)
    command = ["node", str(LOOK), str(DRIVEN), page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seen(written) -> list[dict[str, Any]]:
    return looked_at(written[-1])


def test_what_axe_and_the_widths_would_say_of_a_bad_page(tmp_path):
    page = tmp_path / "bad.html"
    grey = "<p style='width:2000px;color:#ccc;background:#fff'>Some grey words</p>"
    page.write_text(f"<!DOCTYPE html>{grey}<script>console.log('heard')</script>")
    views = looked_at(page)
    assert all("color-contrast" in {name for _, name, _ in view["findings"]} for view in views)
    assert all(view["folded"] >= 2000 and view["said"] == ["heard"] for view in views)


def test_axe_finds_nothing_serious_in_any_width_or_colour(seen):
    assert [(view["scheme"], view["width"]) for view in seen] == [
        (scheme, width) for scheme in ("light", "dark") for width in (360, 800, 1400)
    ]
    assert [view["findings"] for view in seen] == [[]] * 6


def test_nothing_is_wider_than_the_window_and_nothing_is_fetched(seen):
    assert [max(view["folded"], view["open"]) for view in seen] == [view["width"] for view in seen]
    assert [view["scrolled"] for view in seen if view["width"] == 360] == [0, 0]
    assert [view["said"] + view["network"] for view in seen] == [[]] * 6


def test_the_keyboard_reaches_links_and_folds_and_shows_where_it_is(seen):
    for view in seen:
        assert [tag for tag, _ in view["reached"]] == ["A", "SUMMARY", "SUMMARY", "SUMMARY"]
        assert {outline for _, outline in view["reached"]} == {"solid"}


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def pixels(page: Path, folder: Path, scheme: int) -> Image.Image:
    """A screenshot of the page's top, checked to leave the console silent."""
    shot = folder / "shot.png"
    done = browse(page, folder / "profile", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr
    with Image.open(shot) as image:
        return image.convert("RGB")


@needs_browser
@pytest.mark.parametrize(("scheme", "corner"), [(LIGHT, (0xF5, 0xF6, 0xF8)), (DARK, (0x12, 0x15, 0x19))])
def test_page_is_silent_and_follows_the_readers_colours(written, tmp_path, scheme, corner):
    image = pixels(written[-1], tmp_path, scheme)
    assert image.size == (1000, 1400)
    assert image.getpixel((3, 3)) == corner
    shades = {image.getpixel((x, y)) for x in range(0, 1000, 3) for y in range(0, 1400, 7)}
    assert len(shades) > 40  # text and figures, not an empty page


@needs_browser
def test_the_console_check_would_see_an_error(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><title>x</title><script>console.error('heard'); missing()</script>")
    done = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" in done.stderr
