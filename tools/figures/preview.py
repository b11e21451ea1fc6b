"""Render an SVG as a README shows it, on a light and on a dark page, to look at before it is committed.

    python tools/figures/preview.py FILE.svg [FILE.svg …] [--folder FOLDER]

Writes FOLDER/NAME-light.png and FOLDER/NAME-dark.png.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from _browser import take

GROUNDS = {"light": "#ffffff", "dark": "#0d1117"}  # GitHub's


def main() -> None:
    """Write two pictures of every file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="SVG")
    parser.add_argument("--folder", type=Path, default=Path("runs/figures/preview"), help="%(default)s")
    options = parser.parse_args()
    for file in options.files:
        for mode in GROUNDS:
            output = options.folder / f"{file.stem}-{mode}.png"
            preview(file, output, mode)
            print(output)


def preview(file: Path, output: Path, mode: str) -> None:
    """Write a picture of `file` on a page of this mode, with a margin that shows what is clipped."""
    size = re.search(r'width="(\d+)" height="(\d+)"', file.read_text(encoding="utf-8"))
    assert size is not None, file
    width, height = int(size[1]), int(size[2])
    page = (
        f'<html style="color-scheme:{mode}"><body style="margin:20px;background:{GROUNDS[mode]}">'
        f'<img src="{file.resolve().as_uri()}" width="{width}"></body></html>'
    )
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "page.html"
        html.write_text(page, encoding="utf-8")
        take(html, output, width + 40, height + 40, dark=mode == "dark")


if __name__ == "__main__":
    main()
