"""Write docs/images/report.png: the report's token browser, by a headless Chromium.

    python tools/figures/screenshot.py [--runs FOLDER] [--output FILE]

Trains examples/quickstart/config.yaml for ten steps, with the token values of steps 1, 3, 6 and 9 dumped,
makes the run's report, opens it at 1280 × 800 pixels, and takes a picture of the sample browser: of the
distilled samples of step 6 that calculate in steps, the one with the highest mean divergence is open, with
the pointer on its token of the highest divergence. The token's box is moved to where it covers no text. A
finished run under --runs is used again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from _browser import take

from megatron_srpo.observe.report import write_report

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 1280, 800
STEPS = 10
# Appended to the page. Only the browser of samples is left of it.
PROBE = """{
for (const node of document.querySelectorAll('header, #runs, #alarms, [aria-label="Curves"], #notes'))
  node.style.display = "none";
document.querySelector('[data-name="highest divergence"]').click();
byId("step").value = "6";
select();
open(shown.find((sample) => sample.text.startsWith("Steps")), false);
const { divergence } = current.values;
const highest = divergence.indexOf(Math.max(...divergence));
const token = document.querySelectorAll("#sample .token")[highest];
token.dispatchEvent(new PointerEvent("pointerenter"));
tip.style.left = "840px";
tip.style.top = `${token.getBoundingClientRect().bottom + 8}px`;
}"""


def main() -> None:
    """Train the run unless it is there, and photograph its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=ROOT / "runs" / "figures", metavar="FOLDER", help="default: %(default)s")
    add("--output", type=Path, default=ROOT / "docs" / "images" / "report.png", metavar="FILE")
    add("--dark", action="store_true", help="as readers with a dark desktop see it")
    options = parser.parse_args()
    run = options.runs / "quickstart"
    if not (run / "report.html").is_file():
        train(run)
    report = run / "pictured.html"
    write_report([run], report)
    page = report.read_text(encoding="utf-8")
    report.write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    take(report, options.output, WIDTH, HEIGHT, options.dark)
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


def train(run: Path) -> None:
    """Train in a folder that is emptied before; raise SystemExit if it fails."""
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"train.steps={STEPS}", "logging.tokens_every=3", "logging.tokens_samples=24"]
    settings += ["checkpoint.save_interval=0", f"logging.dir={run.resolve()}"]
    command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{run}: {done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
