"""The page in a real browser: no console message, light and dark as the reader prefers."""
# SPDX-License-Identifier: Apache-2.0

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
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
DARK, LIGHT = 0, 1  # Blink's preferredColorScheme

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


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


@pytest.mark.parametrize(("scheme", "corner"), [(LIGHT, (0xF5, 0xF6, 0xF8)), (DARK, (0x12, 0x15, 0x19))])
def test_page_is_silent_and_follows_the_readers_colours(written, tmp_path, scheme, corner):
    image = pixels(written[-1], tmp_path, scheme)
    assert image.size == (1000, 1400)
    assert image.getpixel((3, 3)) == corner
    shades = {image.getpixel((x, y)) for x in range(0, 1000, 3) for y in range(0, 1400, 7)}
    assert len(shades) > 40  # text and figures, not an empty page


def test_the_console_check_would_see_an_error(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><title>x</title><script>console.error('heard'); missing()</script>")
    done = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" in done.stderr
