"""README and docs: size, links, commands, configurations, citations, and the page that is generated.

`mkdocs build --strict` itself is run by tests/run.sh.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import generate_configuration
import pytest

from megatron_srpo.__main__ import command_line
from megatron_srpo.config.load import load_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = ROOT / "examples" / "quickstart" / "config.yaml"
LARGEST_README = 9 * 1024
GPU_MARK = "# needs GPUs"
# Commands of the README that take minutes → where they are run instead.
RUN_ELSEWHERE = {
    "bash examples/quickstart/run.sh": "tests/test_quickstart.py",  # the same training, without installing
    "bash tests/run.sh": ".ci/run",
    "python tools/figures/curves.py": "tests/tools/test_figures.py",  # from finished runs; fifteen trainings
}
# Programs on our pages that belong to other packages; their arguments are not looked at.
OTHER_PROGRAMS = {".", "cd", "git", "hf", "pip", "docker", "mkdocs"}
CITATION = re.compile(r"docs/method\.md,\s+(?:sections?\s+)?(\d)(?:\s*(?:–|-|,|and)\s*(\d))?")

# Of Qwen3-8B's config.json, what `srpo plan` reads.
QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the page's fenced blocks of a language, also those inside list items."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(page.read_text(encoding="utf-8")):
        yield textwrap.dedent(match[2])


def commands(block: str) -> Iterator[list[str]]:
    """Yield the words of each command of a bash block, without comments and variable assignments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words


def srpo_arguments(words: list[str]) -> list[str] | None:
    """Return the arguments that our parser gets, or None if another program is called."""
    if words[0] == "srpo":
        return words[1:]
    if "megatron_srpo" in words and words[words.index("megatron_srpo") - 1] == "-m":
        return words[words.index("megatron_srpo") + 1 :]
    return None


def check_srpo(arguments: list[str]) -> None:
    """Parse with the real parser, and load the configuration with its overrides.

    A file that is not in the repository is the reader's own: the quick start's takes its place.
    """
    parsed = command_line().parse_args(arguments)
    config = getattr(parsed, "config", None) or getattr(parsed, "check", None)
    if config is not None:
        load_config(ROOT / config if (ROOT / config).is_file() else QUICKSTART, parsed.overrides)


def check_program(words: list[str]) -> None:
    """Check that the scripts a command names are in the repository."""
    if words[0] in OTHER_PROGRAMS:
        return
    assert words[0] in ("bash", "python", "torchrun", "sbatch"), f"unknown program: {words}"
    scripts = [word for word in words[1:] if word.endswith((".sh", ".py", ".sbatch")) and "=" not in word]
    assert scripts and all((ROOT / script).is_file() for script in scripts), f"no such script: {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_valid(page):
    for block in blocks(page, "bash"):
        for words in commands(block):
            arguments = srpo_arguments(words)
            if arguments is None:
                check_program(words)
            else:
                check_srpo(arguments)


@pytest.fixture
def rewritten(tmp_path, monkeypatch):
    """Return a function that turns a README command's arguments into those of a short run in `tmp_path`.

    Folders runs/ and models/ are in `tmp_path`; training makes one step and evaluates four questions.
    """
    monkeypatch.chdir(ROOT)
    model = tmp_path / "models" / "Qwen3-8B"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(QWEN3_8B))

    def rewrite(arguments: list[str]) -> list[str]:
        moved = [re.sub(r"(?<![\w/])(runs|models)/", f"{tmp_path}/\\1/", word) for word in arguments]
        if moved[0] != "train":
            return moved
        short = [
            "train.steps=1",
            "rollout.prompts_per_step=8",
            "evaluation.prompts=4",
            "evaluation.samples=1",
        ]
        if not any(word.startswith("logging.dir=") for word in moved):
            short.append(f"logging.dir={tmp_path}/runs/quickstart")
        return [*moved, *short]

    return rewrite


def test_readme_commands_run(rewritten, capsys):
    """Every command that a CPU can run is run, in order, or named in RUN_ELSEWHERE."""
    inline = re.findall(r"`((?:bash|python|srpo) [^`]+)`", README.read_text(encoding="utf-8"))
    ran, elsewhere = [], set(inline)
    for block in blocks(README, "bash"):
        if GPU_MARK in block:
            continue
        for words in commands(block):
            arguments = srpo_arguments(words)
            if arguments is not None:
                parsed = command_line().parse_args(rewritten(arguments))
                assert parsed.run(parsed) == 0, f"{words}: {capsys.readouterr()}"
                ran.append(arguments[0])
            elif words[0] not in OTHER_PROGRAMS:
                elsewhere.add(" ".join(words))
    assert {"train", "report", "plan"} <= set(ran)
    assert elsewhere == set(RUN_ELSEWHERE)
    assert all((ROOT / place).is_file() for place in RUN_ELSEWHERE.values())


def test_readme_marks_what_needs_gpus():
    marked = [block for block in blocks(README, "bash") if GPU_MARK in block]
    assert marked and all(srpo_arguments(words) for block in marked for words in commands(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configurations_are_valid(page, tmp_path):
    """Each YAML block is a configuration, or a part of one."""
    needed = {"model": "{hf_path: model}", "train": "{steps: 1}", "logging": "{dir: runs/example}"}
    for block in blocks(page, "yaml"):
        missing = [
            f"{key}: {value}\n" for key, value in needed.items() if not re.search(rf"^{key}:", block, re.M)
        ]
        file = tmp_path / "config.yaml"
        file.write_text(block + "".join(missing), encoding="utf-8")
        load_config(file, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_parse(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def prose(page: Path) -> str:
    """Return the page's text without fenced blocks, and code spans without their marks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return text.replace("`", "")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(re.sub(r"\s", "-", plain))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Files and folders exist, and so do the headings of pages; addresses elsewhere are not tried."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_is_short_and_has_pictures():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST_README
    pictures = [link for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(pictures) >= 3 and all((ROOT / picture).is_file() for picture in pictures)


def test_cited_sections_of_the_method_exist():
    sections = set(
        re.findall(r"^## (\d)\. ", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.M)
    )
    cited = set()
    for folder in ("megatron_srpo", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for match in CITATION.finditer(file.read_text(encoding="utf-8")):
                cited |= {number for number in match.groups() if number}
    assert len(cited) >= 4 and cited <= sections


def test_configuration_page_is_current():
    # If this fails: python tools/generate_configuration.py
    assert generate_configuration.PAGE.read_text(encoding="utf-8") == generate_configuration.page()


def test_differences_from_the_code_of_sdpo_are_said():
    # The examples called it "SDPO as in its code".
    pages = [*PAGES, *(ROOT / "examples").rglob("*.md")]
    assert not [page for page in pages if "as in its code" in page.read_text(encoding="utf-8")]
    text = " ".join((ROOT / "docs/algorithms.md").read_text(encoding="utf-8").split())
    for difference in ("4/6 of ours", "learning rate 0", "to norms and biases", "first correct sibling"):
        assert difference in text
