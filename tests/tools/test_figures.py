"""The pictures' scripts: what is committed is what they write, and curves are drawn from finished runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "tools" / "figures"
SVG = "{http://www.w3.org/2000/svg}"


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, FIGURES / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_committed_routing_picture_is_the_scripts(tmp_path):
    run("routing.py", "--output", tmp_path / "routing.svg")
    assert (tmp_path / "routing.svg").read_text() == (ROOT / "docs" / "images" / "routing.svg").read_text()


def test_curves_of_finished_runs(tmp_path):
    """Nothing is trained; the table holds means and deviations, the picture a line and a band a method."""
    for method, base in (("grpo", 0.6), ("sdpo", 0.7), ("srpo", 0.8)):
        for seed in range(1, 6):
            folder = tmp_path / "runs" / f"{method}-lr1e-4-seed{seed}"
            folder.mkdir(parents=True)
            scores = {step: 0.5 + (base - 0.5) * step / 30 + 0.01 * (seed - 3) for step in range(0, 31, 5)}
            rows = [{"step": step, "eval/addition/avg@4": score} for step, score in scores.items()]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "curves.svg"
    printed = run("curves.py", "--runs", tmp_path / "runs", "--output", output)
    assert "15 of 15 runs are finished" in printed
    assert "| srpo | 0.600 ± 0.016 | 0.700 ± 0.016 | 0.800 ± 0.016 |" in printed
    svg = ElementTree.parse(output).getroot()
    bands = [path for path in svg.iter(f"{SVG}path") if path.get("opacity") == "0.16"]
    lines = [path for path in svg.iter(f"{SVG}path") if path.get("stroke-linejoin") == "round"]
    assert len(bands) == len(lines) == 3
    assert {"0.800 ± 0.016", "SRPO", "GRPO"} <= {text.text for text in svg.iter(f"{SVG}text")}


def test_pictures_follow_the_readers_mode():
    """The committed drawings have both colours and no ground."""
    for file in (ROOT / "docs" / "images").glob("*.svg"):
        text = file.read_text()
        assert "@media (prefers-color-scheme:dark)" in text and "<rect width=" not in text, file
