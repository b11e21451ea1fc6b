"""Pictures of pages by a headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def find_chromium() -> str:
    """Return the command; raise SystemExit if there is none."""
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise SystemExit(f"none of {', '.join(_NAMES)} is on PATH (Debian: apt-get install chromium)")


def take(page: Path, output: Path, width: int, height: int, dark: bool = False) -> None:
    """Write a PNG of the top of a page, `width` × `height` pixels.

    Raises SystemExit if a script of the page fails, or if there is no picture.
    """
    output.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [find_chromium(), "--headless", "--no-sandbox", *_QUIET, f"--user-data-dir={profile}"]
        command += [f"--window-size={width},{height}", "--virtual-time-budget=5000"]
        command += ["--enable-logging=stderr"]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        command += [f"--screenshot={output.resolve()}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Uncaught" in line]
    if errors:
        raise SystemExit(f"{page}: {errors[0]}")
    if not output.is_file():
        raise SystemExit(f"Chromium wrote no picture: {done.stderr[-2000:]}")
