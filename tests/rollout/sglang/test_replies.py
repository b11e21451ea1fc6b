"""Test the checks of a server's reply without a server: SGLang 0.5.23's replies, and invalid ones."""

from __future__ import annotations

import copy

import pytest
from tables import each_row

from megatron_srpo.rollout.engine import Completion
from megatron_srpo.rollout.servers.replies import InvalidReply, joined
from megatron_srpo.rollout.sglang.api import parse

REPLY = {
    "text": "abc",
    "output_ids": [27, 3, 2],
    "meta_info": {
        "id": "a",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 3,
        "weight_version": "5",
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 3}],
        "output_token_logprobs": [[-0.5, 27, None], [-0.25, 3, None], [0.0, 2, None]],
        "completion_tokens": 3,
    },
}


def read(reply, limit=5, versions=("4", "5")):
    return parse(reply, limit, 30, versions)


def test_a_reply_as_it_should_be():
    assert read(REPLY) == Completion([27, 3, 2], [-0.5, -0.25, 0.0], [("4", 0, 1), ("5", 1, 3)], "stop")


def test_older_servers_name_one_version():
    reply = copy.deepcopy(REPLY)
    del reply["meta_info"]["weight_versions"]
    assert read(reply).versions == [("5", 0, 3)]


def test_a_request_aborted_before_its_first_token_has_nothing():
    # SGLang answers so for a queued request: several keys are missing.
    reply = {
        "text": "",
        "output_ids": [],
        "meta_info": {"id": "a", "finish_reason": {"type": "abort", "message": "x"}},
    }
    assert read(reply) == Completion([], [], [], "abort")


def _put(path, value):
    def change(reply):
        for key in path[:-1]:
            reply = reply[key]
        reply[path[-1]] = value

    return change


META = "meta_info"
BAD = {
    "no object": ([], "not of the shape"),
    "no ids": (_put(["output_ids"], None), "not of the shape"),
    "no finish reason": (_put([META, "finish_reason"], None), "not of the shape"),
    "no log-probabilities": (_put([META, "output_token_logprobs"], None), "not of the shape"),
    "strange finish reason": (_put([META, "finish_reason", "type"], "tired"), "finish_reason 'tired'"),
    "too few ids": (_put(["output_ids"], [27, 3]), "log-probabilities are those of"),
    "other ids": (_put(["output_ids"], [27, 4, 2]), "log-probabilities are those of"),
    "NaN": (_put([META, "output_token_logprobs", 1, 0], float("nan")), "not a finite number"),
    "infinite": (_put([META, "output_token_logprobs", 1, 0], float("-inf")), "not a finite number"),
    "null": (_put([META, "output_token_logprobs", 1, 0], None), "not of the shape"),
    "positive": (_put([META, "output_token_logprobs", 1, 0], 0.1), "not a finite number"),
    "a gap between spans": (_put([META, "weight_versions", 1, "start"], 2), "do not cover"),
    "spans too short": (_put([META, "weight_versions", 1, "end"], 2), "do not cover"),
    "no spans": (_put([META, "weight_versions"], [{}]), "not of the shape"),
    "older weights": (_put([META, "weight_versions", 0, "version"], "3"), r"made by weights \['3'\]"),
    "too short for its length": (
        _put([META, "finish_reason", "type"], "length"),
        "3 tokens and finish_reason length; 5 were requested",
    ),
}


@each_row("change, message", BAD.values())
def test_what_no_correct_server_answers(change, message):
    reply = copy.deepcopy(REPLY)
    if callable(change):
        change(reply)
    else:
        reply = change
    with pytest.raises(InvalidReply, match=message):
        read(reply)


@pytest.mark.parametrize("token", [30, -1, 2.0, True, "2"])
def test_invalid_ids(token):
    reply = copy.deepcopy(REPLY)
    reply["output_ids"][2] = reply[META]["output_token_logprobs"][2][1] = token
    with pytest.raises(InvalidReply, match="outside the vocabulary of 30"):
        read(reply)


def test_more_tokens_than_requested():
    with pytest.raises(InvalidReply, match="2 were requested"):
        read(REPLY, limit=2)


def test_a_continued_attempt_has_the_tokens_of_both():
    first = Completion([1, 2], [-1.0, -2.0], [("3", 0, 1), ("4", 1, 2)], "abort")
    second = Completion([3, 4, 5], [-3.0, -4.0, -5.0], [("4", 0, 1), ("5", 1, 3)], "length")
    assert joined(first, second) == Completion(
        [1, 2, 3, 4, 5], [-1.0, -2.0, -3.0, -4.0, -5.0], [("3", 0, 1), ("4", 1, 3), ("5", 3, 5)], "length"
    )
    assert joined(None, second) == second and joined(Completion([], [], [], "abort"), second) == second
    assert joined(first, Completion([], [], [], "abort")) == first
