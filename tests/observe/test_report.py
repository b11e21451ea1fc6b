"""Test the report in headless Chromium: drawing, filters, colours, and hostile text kept as text."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from samples import make_sample

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config, save_config
from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Route, Verdict
from megatron_srpo.data.rollout_file import dump, step_file
from megatron_srpo.observe import report_samples
from megatron_srpo.observe.inspect import inspect
from megatron_srpo.observe.report import report_data, write_report
from megatron_srpo.observe.tokens import choose, tokens_file, write_tokens

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart" / "config.yaml"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "hostile </script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'><!-- <b>bold</b>"
    " &amp; "
    "\u202eright-to-left\u202c \u05d0\u05d1 nul \x00 escape \x1b[31m \u2028 separator /*JS*/ /*DATA*/ {{x}}"
    " ${1}"
)
STEPS, PROMPTS, GROUP = 20, 32, 4  # of each of two runs: 5,120 samples


def row(step):
    """Return a training step's line of metrics.jsonl."""
    shares = {
        "pass_rate": 0.4 + 0.02 * step,
        "format_rate": 1.0,
        "truncated_share": 0.0,
        "sdpo_sample_share": 0.5,
        "sdpo_token_share": 0.4,
    }
    numbers = {
        "policy_entropy": 0.5,
        "teacher_entropy": 0.3,
        "distillation_divergence": 0.1,
        "entropy_weight_std": 0.2,
        "grad_norm": 1 / step,
    }
    costs = {"tokens": 1000, "seconds": 2.0, "seconds_rollout": 1.0, "seconds_update": 1.0}
    gaps = {
        "engine_logprob_gap": 1e-7,
        "zero_advantage_share": 1.0 if step > 15 else 0.2,
        "teacher_distance": 0.1,
        "teacher_followed": 0.05,
    }
    return {
        "step": step,
        "loss": 0.1,
        "updates": 1,
        "updates_skipped": 0,
        "response_tokens_mean": 3.0,
        **shares,
        **numbers,
        **costs,
        **gaps,
    }


def sample(step, prompt, index):
    """Return a sample; each group has a correct, a distilled, a failed and an unjudged one.

    The failed one has no teacher; the last step's first sample is hostile.
    """
    text = HOSTILE if (step, prompt, index) == (STEPS, 0, 0) else f"answer {step} {prompt} {index}"
    verdict = Verdict(
        reward=float(index == 0),
        correct=index == 0,
        format_ok=True,
        verifier_failed="timeout" if index == 3 else None,
    )
    is_distilled = index == 1
    route = Route(
        branch="sdpo" if is_distilled else "grpo",
        policy_weight=float(not is_distilled),
        distillation_weight=float(is_distilled),
        advantage=0.75 if index == 0 else -0.25,
        sibling=0 if is_distilled else None,
    )
    made = make_sample(
        index,
        prompt_id=f"{step}/{prompt}",
        response_ids=(3, 4, 5),
        text=text,
        question=f"Question {prompt}?",
        route=route,
    )
    return made.model_copy(
        update={"verdict": verdict, "finish_reason": "length" if (prompt, index) == (7, 2) else "stop"}
    )


def values(key, divergence):
    """Return a row of TokenValues for three tokens."""
    top = [[[token, -0.1 - token] for token in range(5)] for _ in range(3)]
    numbers = {"logprob": [-0.1, -1.0, -3.0], "entropy": [0.1, 0.2, 0.3]}
    taught = {
        "divergence": divergence,
        "teacher_entropy": [0.1, 0.2, 0.3],
        "weight": [0.5, 1.0, 1.8],
        "teacher_logprob": [-0.2, -3.0, -0.1],
    }
    return {
        "prompt_id": key[0],
        "index": key[1],
        "top": top,
        **numbers,
        **(taught if key[1] == 1 else {}),
        "teacher_top": top,
        "tokens": [3, 4, 5],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return two runs' folders; the second was killed: its files end in truncated lines."""
    paths = []
    for name in ("first", "second"):
        path = tmp_path_factory.mktemp("runs") / name
        path.mkdir()
        save_config(
            load_config(
                QUICKSTART,
                [f"logging.dir={path}", "algorithm.name=" + ("srpo" if name == "first" else "sdpo")],
            ),
            path / "config.yaml",
        )
        rows = [row(step) for step in range(1, STEPS + 1)]
        score = {
            "eval/addition/avg@4": 0.5,
            "eval/addition/avg_low": 0.4,
            "eval/addition/avg_high": 0.6,
            "eval/addition/pass@4": 0.9,
        }
        rows += [{"step": step, **score} for step in (0, 10, 20)]
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in rows)
            + ('{"step": 21, "pas' if name == "second" else "")
        )
        for step in range(1, STEPS + 1):
            groups = [
                tuple(sample(step, prompt, index) for index in range(GROUP)) for prompt in range(PROMPTS)
            ]
            dump(groups, path / "rollouts", step)
            if step % 10 == 1:
                rows = [
                    values(key, [0.0, 0.3, 0.6 if number == 3 else 0.1])
                    for number, key in enumerate(choose([outline(group) for group in groups], 9))
                ]
                write_tokens(
                    rows,
                    lambda ids: ["<b>", "ha", "\n", "x", "</script>", "z"][ids[0]],
                    path / "rollouts",
                    step,
                )
        paths.append(path)
    with step_file(paths[1], STEPS).open("a") as out:
        out.write('{"step": 20, "prom')
    return paths


def browse(page: str, folder: Path, width: int, probe: str) -> dict:
    """Return what `probe` finds in the page in Chromium at this width.

    It includes everything that went wrong on the console or the network.
    """
    watch = (
        "<script>window.problems = []; addEventListener('error', (e) => problems.push(String(e.message)),"
        " true);"
        "addEventListener('securitypolicyviolation', (e) => problems.push(e.blockedURI));"
        "for (const kind of ['error', 'warn']) console[kind] = (...all) => problems.push(all.join('"
        " '));</script>"
    )
    file = folder / f"probed-{width}.html"
    file.write_text(
        page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{watch}', 1).replace(
            "</body>", f"<script>{probe}</script></body>"
        )
    )
    quiet = [
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    options = [
        "--headless",
        "--no-sandbox",
        *quiet,
        f"--user-data-dir={folder / f'profile-{width}'}",
        f"--window-size={width},900",
    ]
    command = [
        CHROMIUM,
        *options,
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="probe">([^<]*)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    found = json.loads(base64.b64decode(match[1]))
    found["problems"] += [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_in_chromium(folders, tmp_path, width):
    write_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    found = browse(page, tmp_path, width, (HERE / "probe.js").read_text())
    assert found["problems"] == [] and found["requests"] == []
    assert found["count"] == "5,000 of 5,000" or found["count"].endswith("of 4,864")  # complete steps only
    assert {"addition/avg@4", "Pass rate", "Entropy weights", "Log-prob gap", "Time by phase"} <= set(
        found["charts"]
    )
    assert (
        found["paths"] == found["after"] >= 2 * len(found["charts"]) - 4
        and found["bands"] == 6
        and not found["broken"]
    )
    assert found["wide"] == 0 and found["tipInside"]  # nothing overflows the page
    assert len(found["alarms"]) == 2 and "dead_groups · first, steps 18 to 20" in found["alarms"][0]

    steps = int(found["count"].split(" of ")[1].replace(",", "")) // (PROMPTS * GROUP)
    shown = {name: int(count.split(" of ")[0].replace(",", "")) for name, count in found["filters"].items()}
    assert (
        shown["wrong, to GRPO"] == steps * PROMPTS * 2
        and shown["verifier failed"] == steps * PROMPTS
        and shown["truncated"] == steps
    )
    assert found["divergences"] == sorted(found["divergences"], reverse=True) and found["divergences"][
        0
    ] == pytest.approx(0.3)
    colors = found["colors"]
    assert all(len(of_tokens) == 3 for of_tokens in colors.values())
    assert colors["divergence"][0] == "" and "--heat" in colors["divergence"][2]
    assert [
        "--less" in colors["entropy weight"][0],
        colors["entropy weight"][1],
        "--more" in colors["entropy weight"][2],
    ] == [
        True,
        "",
        True,
    ]
    assert all("--less" in of_token for of_token in colors["advantage"])
    assert "--less" in colors["teacher − policy"][1] and "--more" in colors["teacher − policy"][2]
    assert "student" in found["tip"] and "teacher" in found["tip"] and "<b>90.5 %" in found["tip"]

    assert found["elements"] == 0 and found["ran"] == "undefined"
    for text in (
        "</script><script>window.ran = 1</script>",
        "<img src=x",
        "<b>bold</b> &amp; ⟨U+202E⟩right-to-left",
        "nul ␀ escape ␛[31m ⟨U+2028⟩",
    ):
        assert text in found["hostile"]


@needs_chromium
def test_the_probe_would_notice(tmp_path):
    # An error, a console message and a request are all found in a page that has them.
    page = '<html><head><meta charset="utf-8"></head><body><img src="http://localhost:1/x">'
    page += '<script>console.error("logged"); missing();</script></body>'
    probe = (
        "addEventListener('load', () => setTimeout(() => {"
        " document.body.append(Object.assign(document.createElement('pre'), { id: 'probe',"
    )
    probe += (
        " textContent: btoa(JSON.stringify({ problems, requests:"
        " performance.getEntriesByType('resource').length })) })); }, 200));"
    )
    found = browse(page, tmp_path, 1280, probe)
    assert any("logged" in problem for problem in found["problems"]) and any(
        "missing" in problem for problem in found["problems"]
    )
    assert found["requests"] == 1


@needs_chromium
def test_runs_with_little_to_show(folders, tmp_path):
    # The page is drawn for a run before its first step, and for one whose first norm and token values are not
    # numbers.
    started, bad = tmp_path / "started", shutil.copytree(folders[0], tmp_path / "bad")
    started.mkdir()
    shutil.copy(bad / "config.yaml", started)
    (started / "metrics.jsonl").write_text('{"step": 0, "eval/addition/avg@4": 0.5}\n')
    (bad / "metrics.jsonl").write_text(
        json.dumps(row(1) | {"grad_norm": None}) + "\n" + json.dumps(row(2)) + "\n"
    )
    tokens = tokens_file(bad, 1)
    tokens.write_text(
        tokens.read_text().replace("-3.0", "NaN").replace("0.3", "NaN").replace("1.8", "-Infinity")
    )
    assert "NaN" in tokens.read_text()
    write_report([started, bad], tmp_path / "report.html")
    probe = (
        "const titles = [...document.querySelectorAll('.chart h3')].map((one) => one.firstChild.textContent);"
    )
    probe += "document.body.append(Object.assign(document.createElement('pre'), { id: 'probe',"
    probe += " textContent: btoa(unescape(encodeURIComponent(JSON.stringify({ problems, titles })))) }));"
    found = browse((tmp_path / "report.html").read_text(), tmp_path, 1280, probe)
    assert found["problems"] == [] and {"addition/avg@4", "Gradient norm", "Entropy weights"} <= set(
        found["titles"]
    )
    number = next(
        one["number"]
        for one in report_data([bad], 5000)["samples"]
        if one["step"] == 1 and one.get("values", {}).get("weight")
    )
    console = Console(file=io.StringIO(), width=200)
    inspect(bad, 1, number, console)
    assert "divergence –" in console.file.getvalue()


@needs_chromium
def test_token_values_that_are_left_out_are_marked(folders, tmp_path, monkeypatch):
    # Of three tokens, the first and the last are shown; the first sample shown has the values of a teacher.
    monkeypatch.setattr(report_samples, "TOKENS", 2)
    write_report([folders[0]], tmp_path / "report.html")
    probe = "const found = { problems, tokens: document.querySelectorAll('#sample .token').length,"
    probe += " text: document.getElementById('sample').textContent };"
    probe += "document.body.append(Object.assign(document.createElement('pre'), { id: 'probe',"
    probe += " textContent: btoa(unescape(encodeURIComponent(JSON.stringify(found)))) }));"
    found = browse((tmp_path / "report.html").read_text(), tmp_path, 1280, probe)
    assert found["problems"] == [] and found["tokens"] == 2
    assert "[… 1 tokens left out …]" in found["text"]


def test_a_killed_run_is_read_to_its_last_complete_line(folders):
    data = report_data([folders[1]], 10_000)
    assert data["runs"][0]["columns"]["step"] == list(range(1, STEPS + 1))
    assert len(data["samples"]) == STEPS * PROMPTS * GROUP
    assert len(data["notes"]) == 2 and all(
        "is damaged" in note and note.endswith("left out") for note in data["notes"]
    )


def test_a_row_that_is_no_sample_is_left_out(folders, tmp_path):
    run = shutil.copytree(folders[0], tmp_path / "run")
    lines = step_file(run, 2).read_text().splitlines()
    step_file(run, 2).write_text("\n".join([lines[0].replace('"reward"', '"score"'), *lines[1:]]))
    data = report_data([run], 10_000)
    assert len(data["samples"]) == STEPS * PROMPTS * GROUP - 1
    (note,) = data["notes"]
    assert "step_000002.jsonl:1: verdict.reward: Field required; is not a valid sample and left out" in note


def test_fewer_samples_are_complete_steps_and_the_page_says_so(folders):
    data = report_data([folders[0]], 700)
    steps = sorted({one["step"] for one in data["samples"]})
    assert len(steps) == 5 and {1, 11, 20} <= set(
        steps
    )  # those with token values, and others spread over the run
    assert data["notes"] == ["first: this page has the samples of 5 of 20 steps; rollouts/ has all of them."]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        report_data([tmp_path], 10)
