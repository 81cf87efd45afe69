"""Screenshots of docs/ui.md: ``python recipes/ui_screenshots.py docs/images``; needs the extra ``browser``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

STEPS = 200  # more than the default, so that there is time to take a picture of a run that goes on
WIDTH, HEIGHT = 1240, 800


def main(folder: Path) -> None:
    """Learn <cleo> on the page, and keep a picture of each step."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "ti_jax", "ui", "--output_dir", "output", "--port", "0"]
        with (
            subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as server,
            sync_playwright() as started,
        ):
            assert server.stdout is not None
            found = re.match(r"\S+", server.stdout.readline())
            assert found is not None
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            tab.set_default_timeout(300_000)
            tab.goto(found[0])
            take(tab, folder)
            browser.close()
            server.kill()


def take(tab: Any, folder: Path) -> None:
    """Go through the steps."""
    tab.click("#example")
    tab.wait_for_selector("#sheet img")
    shot(tab, folder / "ui-pictures.png")
    tab.fill("#steps textarea", str(STEPS))
    tab.click("#learn")
    tab.wait_for_selector("#progress img")
    tab.wait_for_function(
        f"parseInt(document.querySelector('#state').innerText.match(/step (\\d+)/)?.[1]) > {STEPS // 2}"
    )
    shot(tab, folder / "ui-learning.png")
    tab.wait_for_selector("#state .finished")
    tab.get_by_role("tab", name="3 Try").click()
    tab.click("#try-other input")
    tab.get_by_role("option", name=f"step {STEPS // 5}").click()
    tab.click("#draw")
    tab.wait_for_selector("#drawn img")
    shot(tab, folder / "ui-try.png")
    tab.get_by_role("tab", name="4 Save").click()
    tab.click("#save")
    tab.wait_for_selector("#files a")
    shot(tab, folder / "ui-save.png")


def shot(tab: Any, path: Path) -> None:
    """A picture of the whole page, in as few colours as make a small file."""
    tab.wait_for_timeout(1500)  # until nothing moves
    tab.screenshot(path=str(path), full_page=True)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
