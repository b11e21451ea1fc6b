"""Test samples as sequences of segments; the response of an older run folder is a single segment."""

import json

import pytest
from pydantic import ValidationError
from samples import make_sample
from tables import each_row

from megatron_srpo.data.records import Sample, Segment


def conversation() -> Sample:
    """Return two turns of the policy around one observation."""
    first = Segment(ids=(11, 12, 13), logprobs=(-0.1, -0.2, -0.3), versions=(("4", 0, 1), ("5", 1, 3)))
    observation = Segment(author="environment", ids=(21, 22))
    last = Segment(ids=(14,), logprobs=(-0.4,), versions=(("6", 0, 1),))
    return make_sample().model_copy(update={"segments": (first, observation, last)})


def test_only_the_policys_tokens_count():
    sample = conversation()
    assert sample.response_ids == (11, 12, 13, 21, 22, 14)
    assert sample.loss_mask == (True, True, True, False, False, True)
    assert sample.policy_ids == (11, 12, 13, 14) and sample.policy_tokens == 4
    assert sample.logprobs == (-0.1, -0.2, -0.3, -0.4)
    assert sample.versions == (("4", 0, 1), ("5", 1, 3), ("6", 5, 6))


def test_segments_survive_json():
    sample = conversation()
    assert Sample.model_validate_json(sample.model_dump_json()) == sample


def test_a_line_of_an_older_run_is_one_segment():
    row = json.loads(make_sample(correct=True).model_dump_json())
    segment = row.pop("segments")[0]
    row |= {"response_ids": segment["ids"], "logprobs": segment["logprobs"], "versions": segment["versions"]}
    assert Sample.model_validate(row) == make_sample(correct=True)


@each_row(
    "segment, message",
    [
        ({"ids": [1, 2], "logprobs": [-1.0]}, "2 ids of the policy but 1 logprobs"),
        (
            {"author": "environment", "ids": [1], "logprobs": [-1.0]},
            "1 ids of the environment but 1 logprobs",
        ),
        ({"author": "environment", "ids": [1]}, "none is the policy's"),
        ({"author": "teacher", "ids": [1], "logprobs": [-1.0]}, "'policy' or 'environment'"),
        ({"ids": []}, "at least 1 item"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segment, message):
    row = json.loads(make_sample().model_dump_json()) | {"segments": [segment]}
    with pytest.raises(ValidationError, match=message):
        Sample.model_validate(row)
