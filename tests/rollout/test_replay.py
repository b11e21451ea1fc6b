"""Test rollouts on disk: a dump is replayed, and a damaged file is refused by file and line."""

import json
import math

import pytest
from samples import make_group, make_sample
from tables import each_row
from tiny import save_folder

from megatron_srpo.config.base import ConfigError
from megatron_srpo.data.records import Route
from megatron_srpo.data.rollout_file import dump, step_file
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.replay import replay

TEXTS = [
    "two\u2028lines\u2029of\x85 text",
    'quotes " and \\ and \\n',
    "🙂👩‍👩‍👧 ünïcode",
    "tab\tnew\nline\r\nreturn\r\0",
    "</s>{}[]",
    "",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder whose vocabulary has 270 ids."""
    return HFFolder(save_folder(tmp_path_factory.mktemp("model")))


def write(folder, step=1, correct=((1, 0), (0, 0))):
    dump([make_group(row, prompt_id=f"p{number}") for number, row in enumerate(correct)], folder, step)
    return step_file(folder, step)


def edit(file, number, change):
    """Change the object on line `number` (from 1)."""
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    row = json.loads(lines[number - 1])
    change(row)
    lines[number - 1] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def refusal(folder, model, samples_per_prompt=2, step=1):
    with pytest.raises(ConfigError) as caught:
        replay(folder, step, samples_per_prompt, model)
    return str(caught.value)


def test_what_is_dumped_is_replayed(tmp_path, model):
    groups = []
    for number, text in enumerate(TEXTS):
        group = []
        for index in range(3):
            sample = make_sample(
                index,
                bool(index),
                prompt_id=f"p{number}",
                prompt_ids=(0, 269, 3),
                response_ids=range(1 + index, 9),
                logprobs=[-1 / 3 - place * 1e-17 - 0.1 for place in range(8 - index)],
                text=text,
                question=text + "?",
            )
            group.append(sample)
        groups.append(tuple(group))
    dump(groups, tmp_path / "new" / "folder", 12)
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["step_000012.jsonl"]
    assert replay(tmp_path / "new" / "folder", 12, 3, model) == groups


def test_one_json_object_a_line(tmp_path):
    dump([make_group((1, 0))], tmp_path, 3)
    lines = step_file(tmp_path, 3).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], row["index"], row["prompt"]["id"]) for row in rows] == [(3, 0, "p"), (3, 1, "p")]
    assert [row["verdict"]["correct"] for row in rows] == [True, False]


def test_dump_is_readable_by_people(tmp_path):
    sample = make_sample(text="naïve 🙂 日本")
    dump([(sample,)], tmp_path, 1)
    assert "naïve 🙂 日本" in step_file(tmp_path, 1).read_text(encoding="utf-8")


def test_routes_are_dumped_for_people_and_dropped_by_replay(tmp_path, model):
    route = Route(
        branch="sdpo",
        policy_weight=0,
        distillation_weight=1,
        advantage=-0.5,
        sibling=1,
        teacher_ids=(1, 2, 3),
    )
    group = tuple(sample.model_copy(update={"route": route}) for sample in make_group((1, 0)))
    dump([group], tmp_path, 1)
    assert json.loads(step_file(tmp_path, 1).read_text().split("\n")[0])["route"]["teacher_ids"] == [1, 2, 3]
    assert replay(tmp_path, 1, 2, model) == [make_group((1, 0))]


def test_dump_replaces_a_complete_file(tmp_path, model):
    write(tmp_path, correct=((1, 0), (0, 0), (1, 1)))
    write(tmp_path, correct=((0, 1),))
    assert replay(tmp_path, 1, 2, model) == [make_group((0, 1), "p0")]
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001.jsonl"]


def test_missing_step(tmp_path, model):
    write(tmp_path, step=1)
    assert "step_000002.jsonl is missing" in refusal(tmp_path, model, step=2)
    assert "step_000001.jsonl is missing" in refusal(tmp_path / "nowhere", model)


@each_row("line", ["", "{", "not json", '{"prompt": }', "[]", "5", "null", '"text"', "{}", '{"step": 1}'])
def test_damaged_line(tmp_path, model, line):
    file = write(tmp_path)
    lines = file.read_text().split("\n")
    lines[2] = line
    file.write_text("\n".join(lines))
    assert f"{file}:3: " in refusal(tmp_path, model)


def test_line_cut_short(tmp_path, model):
    # A full disk leaves such a line.
    file = write(tmp_path)
    file.write_text(file.read_text()[:-40])
    assert f"{file}:4: " in refusal(tmp_path, model)


def test_line_with_bytes_that_are_no_text(tmp_path, model):
    file = write(tmp_path)
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"answer", b"ans\xff\xfewer")
    file.write_bytes(b"\n".join(lines))
    assert str(file) in refusal(tmp_path, model)


def test_empty_file(tmp_path, model):
    file = write(tmp_path)
    file.write_text("")
    assert str(file) in refusal(tmp_path, model)


@each_row(
    "change, named",
    [
        (lambda row: row.pop("segments"), "segments"),
        (lambda row: row.update(segments=[]), "segments"),
        (lambda row: row["segments"][0].update(ids=[]), "segments.0.ids"),
        (lambda row: row["segments"][0].update(author="environment", logprobs=[]), "none is the policy's"),
        (lambda row: row["segments"][0].update(author="environment"), "2 logprobs"),
        (lambda row: row["segments"][0]["ids"].append(5), "3 ids of the policy but 2 logprobs"),
        (lambda row: row["segments"][0].update(logprobs=["x", 1]), "segments.0.logprobs.0"),
        (lambda row: row.update(surprise=1), "surprise"),
        (lambda row: row.update(verdict=None), "verdict"),
        (lambda row: row["verdict"].pop("reward"), "verdict.reward"),
        (lambda row: row["prompt"].pop("messages"), "prompt.messages"),
        (lambda row: row.update(finish_reason="bored"), "finish_reason"),
    ],
)
def test_line_with_wrong_fields(tmp_path, model, change, named):
    file = write(tmp_path)
    edit(file, 2, change)
    message = refusal(tmp_path, model)
    assert message.startswith(f"{file}:2: ") and named in message


@each_row(
    "change",
    [
        lambda row: row["segments"][0].update(ids=[5, 270]),
        lambda row: row["segments"][0].update(ids=[-1, 5]),
        lambda row: row["prompt"].update(ids=[1, 2, 270]),
        lambda row: row["prompt"].update(ids=[-5]),
        lambda row: row["prompt"].update(ids=[]),
    ],
)
def test_ids_outside_the_vocabulary(tmp_path, model, change):
    file = write(tmp_path)
    edit(file, 4, change)
    assert refusal(tmp_path, model).startswith(
        f"{file}:4: prompt.ids are missing or an id is outside the model's vocabulary"
    )


def test_largest_id_is_inside(tmp_path, model):
    file = write(tmp_path)
    edit(file, 4, lambda row: row["segments"][0].update(ids=[0, 269]))
    assert replay(tmp_path, 1, 2, model)[1][1].response_ids == (0, 269)


def test_log_probability_that_is_no_number(tmp_path, model):
    # NaN would make the entire update NaN; the line is named instead.
    file = write(tmp_path)
    edit(file, 3, lambda row: row["segments"][0].update(logprobs=[-1.0, math.nan]))
    assert refusal(tmp_path, model).startswith(f"{file}:3: ")


def test_incomplete_group(tmp_path, model):
    file = write(tmp_path)
    lines = file.read_text().split("\n")
    del lines[1]
    file.write_text("\n".join(lines))
    message = refusal(tmp_path, model)
    assert str(file) in message and "group of p0" in message and "[0]" in message and "0 to 1" in message


@pytest.mark.parametrize("samples_per_prompt", [1, 3])
def test_groups_of_another_size(tmp_path, model, samples_per_prompt):
    write(tmp_path)
    assert "rollout.samples_per_prompt" in refusal(tmp_path, model, samples_per_prompt)


def test_samples_out_of_order(tmp_path, model):
    file = write(tmp_path)
    first, second, *rest = file.read_text().split("\n")
    file.write_text("\n".join([second, first, *rest]))
    assert "group of p0 has samples [1, 0]" in refusal(tmp_path, model)


def test_long_samples_are_replayed_from_their_binary_file(tmp_path, model):
    ids = [number % 270 for number in range(3000)]
    logprobs = [-0.001 * number for number in range(3000)]  # no float32 numbers
    group = tuple(
        make_sample(index, bool(index), prompt_ids=ids[:5], response_ids=ids, logprobs=logprobs)
        for index in range(2)
    )
    dump([group, make_group((1, 0), "q")], tmp_path, 1)
    assert replay(tmp_path, 1, 2, model) == [group, make_group((1, 0), "q")]
    binary = tmp_path / "step_000001.bin"
    content = bytearray(binary.read_bytes())
    content[-1] ^= 1
    binary.write_bytes(content)
    message = refusal(tmp_path, model)
    assert message.startswith(f"{step_file(tmp_path, 1)}:2: step_000001.bin") and "CRC-32" in message
    binary.unlink()
    assert f"{step_file(tmp_path, 1)}:1: step_000001.bin" in refusal(tmp_path, model)
