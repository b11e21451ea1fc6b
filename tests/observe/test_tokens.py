"""Test which samples' tokens are dumped, and the content of their file.

Its numbers: tests/distributed/test_invariance.py.
"""

from __future__ import annotations

import pytest
from samples import make_sample

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.outline import outline
from megatron_srpo.data.records import Route
from megatron_srpo.observe.tokens import choose, read_tokens, tokens_file, write_tokens


def group(prompt, kinds):
    """Return a group by `kinds`: r right, d distilled, f failed without a teacher, n no gradient."""
    return tuple(
        make_sample(
            index,
            correct=kind == "r",
            prompt_id=prompt,
            route=Route(
                branch="sdpo" if kind == "d" else "grpo",
                policy_weight=float(kind != "d"),
                distillation_weight=float(kind == "d"),
                advantage=0.0 if kind == "n" else 1.0,
            ),
        )
        for index, kind in enumerate(kinds)
    )


def test_samples_of_every_kind_and_of_many_prompts_are_chosen():
    kinds = {"a": "rddd", "b": "rrdd", "c": "ffff", "d": "nn"}
    groups = [outline(group(*one)) for one in kinds.items()]
    assert choose(groups, 6) == [("a", 1), ("c", 0), ("a", 0), ("b", 2), ("c", 1), ("b", 0)]
    assert len(choose(groups, 100)) == len(set(choose(groups, 100))) == 12
    assert choose([], 5) == []


def test_ids_become_text_and_a_damaged_file_is_named(tmp_path):
    (tmp_path / "rollouts").mkdir()
    row = {"prompt_id": "a", "index": 1, "logprob": [-1.0, -2.0], "top": [[[8, -0.1]], [[3, -0.2]]]}
    row["tokens"] = [8, 9]
    write_tokens([row], lambda ids: f"<{ids[0]}>", tmp_path, 4)
    ((key, found),) = read_tokens(tmp_path, 4)
    assert found == {**row, "step": 4, "tokens": ["<8>", "<9>"], "top": [[["<8>", -0.1]], [["<3>", -0.2]]]}
    assert key == ("a", 1) and list(read_tokens(tmp_path, 5)) == []
    with tokens_file(tmp_path, 4).open("a") as out:
        out.write('{"step": 4')
    with pytest.raises(ConfigError, match=r"step_000004.tokens.jsonl:2: is damaged"):
        list(read_tokens(tmp_path, 4))
