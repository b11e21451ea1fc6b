"""Draw docs/images/routing.svg: what each sample of a group is trained with.

    python tools/figures/routing.py [--output FILE]

A mixed group of eight samples, whose correct ones take the policy gradient and whose failed ones are
distilled, and a group without a correct sample, which has no gradient (docs/method.md, section 3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _svg import Drawing

OUTPUT = Path(__file__).parents[2] / "docs" / "images" / "routing.svg"
WIDTH, HEIGHT = 880, 424
CORRECT = (True, False, False, True, False, True, False, False)  # the mixed group
TEXT_WIDTHS = (118, 96, 126, 104, 122, 88, 110, 128)  # of the responses drawn as bars
LEFT, TOP, ROW, SAMPLE_WIDTH = 24, 62, 29, 226
BOX_LEFT, BOX_WIDTH = 446, 410
TITLE = "Sample routing in SRPO"
DESCRIPTION = (
    "In a group with both correct and failed samples, correct samples take the GRPO policy gradient and"
    " failed ones are distilled from a teacher that has seen a correct sibling. A group without a correct"
    " sample has advantage 0 and no gradient."
)


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: %(default)s")
    draw().save(parser.parse_args().output)


def draw() -> Drawing:
    """Draw one mixed group with its two outcomes, and one group without a correct sample."""
    drawing = Drawing(WIDTH, HEIGHT, TITLE, DESCRIPTION)
    drawing.text(LEFT, 28, "One prompt, a group of eight samples", bold=True, size=16)
    drawing.text(LEFT, 48, "each judged by a verifier: reward 1 or 0", "quiet", 13.5)
    drawing.text(BOX_LEFT, 28, "What a sample is trained with", bold=True, size=16)
    boxes = _outcomes(drawing)
    _mixed_group(drawing, *boxes)
    _failed_group(drawing)
    return drawing


def _mixed_group(drawing: Drawing, policy: float, distillation: float) -> None:
    """Draw the samples and their arrows to the two boxes, which are entered at these heights."""
    right = LEFT + SAMPLE_WIDTH
    count = {True: 0, False: 0}
    for place, correct in enumerate(CORRECT):
        y = TOP + ROW * place
        color = "green" if correct else "orange"
        _sample(drawing, y, place, correct)
        aim = (policy if correct else distillation) + 7 * (count[correct] - (1 if correct else 2))
        count[correct] += 1
        start = y + 11
        curve = f"M{right + 6},{start} C{right + 110},{start} {BOX_LEFT - 110},{aim} {BOX_LEFT - 12},{aim}"
        drawing.path(curve, color, 1.8, opacity="0.85")
        _arrow_head(drawing, BOX_LEFT - 3, aim, color)
    _sibling(drawing, right, distillation)


def _sibling(drawing: Drawing, right: float, distillation: float) -> None:
    """Draw the dashed arrow from a correct sample to the teacher."""
    start, aim = TOP + ROW * 3 + 16, distillation + 34
    curve = f"M{right + 6},{start} C{right + 100},{start} {BOX_LEFT - 120},{aim} {BOX_LEFT - 12},{aim}"
    drawing.path(curve, "green", 1.6, stroke_dasharray="5 4")
    _arrow_head(drawing, BOX_LEFT - 3, aim, "green")


def _sample(drawing: Drawing, y: float, place: int, correct: bool) -> None:
    color = "green" if correct else "orange"
    drawing.rect(LEFT, y, SAMPLE_WIDTH, 22, 6, class_=f"s s-{color}", stroke_width="1.4")
    drawing.text(LEFT + 10, y + 15.5, f"sample {place + 1}", size=13)
    width = TEXT_WIDTHS[place]
    drawing.path(f"M{LEFT + 86},{y + 11} h{width - 20}", "line", 6, stroke_linecap="round")
    _mark(drawing, LEFT + SAMPLE_WIDTH - 15, y + 11, correct)


def _outcomes(drawing: Drawing) -> tuple[float, float]:
    """Draw the three boxes; return the heights at which arrows enter the first two."""
    policy = ("its advantage: reward minus the group's mean", "GRPO's clipped objective on its own tokens")
    distillation = (
        "its tokens are scored again by the teacher, a slow copy",
        "of the policy that has read a correct sibling (dashed);",
        "Jensen–Shannon divergence at each token, over the whole",
        "vocabulary, weighted by the teacher's certainty",
    )
    nothing = ("all rewards are equal, so every advantage is 0,", "and there is no correct sibling to show")
    _box(drawing, 62, "Correct: policy gradient", policy, "green")
    _box(drawing, 156, "Failed, with a correct sibling: distillation", distillation, "orange")
    _box(drawing, 338, "All wrong: no gradient", nothing, "quiet")
    return 97.0, 196.0


def _box(drawing: Drawing, y: float, title: str, lines: tuple[str, ...], color: str) -> None:
    height = 36 + 19 * len(lines)
    drawing.rect(BOX_LEFT, y, BOX_WIDTH, height, 8, class_=f"f-{color}", opacity="0.09")
    drawing.rect(BOX_LEFT, y, BOX_WIDTH, height, 8, class_=f"s s-{color}", stroke_width="1.4")
    drawing.text(BOX_LEFT + 14, y + 23, title, color, 15, bold=True)
    for number, line in enumerate(lines):
        drawing.text(BOX_LEFT + 14, y + 44 + 19 * number, line, size=13)


def _failed_group(drawing: Drawing) -> None:
    """Draw a group of eight failed samples in a row, and its arrow."""
    drawing.text(LEFT, 330, "Another prompt, no sample correct", bold=True, size=16)
    y, size = 350, 24
    for place in range(8):
        x = LEFT + place * (SAMPLE_WIDTH - size) / 7
        drawing.rect(x, y, size, size, 6, class_="s s-orange", stroke_width="1.4")
        _mark(drawing, x + size / 2, y + size / 2, False)
    middle = y + size / 2
    start, end = LEFT + SAMPLE_WIDTH + 6, BOX_LEFT - 12
    drawing.path(f"M{start},{middle} H{end}", "quiet", 1.8)
    _arrow_head(drawing, BOX_LEFT - 3, middle, "quiet")


def _mark(drawing: Drawing, x: float, y: float, correct: bool) -> None:
    """Draw a tick or a cross around (x, y), as lines: fonts lack the characters."""
    if correct:
        drawing.path(f"M{x - 5},{y} l4,4.5 l7,-9", "green", 2.2, stroke_linecap="round")
    else:
        drawing.path(f"M{x - 4},{y - 4} l8,8 m0,-8 l-8,8", "orange", 2.2, stroke_linecap="round")


def _arrow_head(drawing: Drawing, x: float, y: float, color: str) -> None:
    drawing.area([(x, y), (x - 10, y - 3.4), (x - 10, y + 3.4)], color, 1)


if __name__ == "__main__":
    main()
