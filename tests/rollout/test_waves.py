"""Compare the embedded engine's waves with full forward passes, and resumed with uninterrupted sampling.

Several requests for each prompt, few rows, answers of all lengths: rows leave and others enter.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file
from soak import comparable
from tiny import make_model, save_folder

from megatron_srpo.model.families import families
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Request, Sampling
from megatron_srpo.rollout.transformers import engine as engines
from megatron_srpo.rollout.transformers import linear
from megatron_srpo.rollout.transformers import wave as waves
from megatron_srpo.rollout.transformers.engine import TransformersEngine
from megatron_srpo.rollout.transformers.sampling import uniforms

ROOT = Path(__file__).parents[2]
# fp32 rounds logits of up to 10 by 5e-7, and each implementation sums in another order; 1.3e-6 was measured
# against float64
TOLERANCE = 4e-6
STOPS = tuple(range(0, 270, 18))
NEVER = (270,)  # not in the vocabulary
SAMPLING = Sampling(0.9, 1.0, 40, STOPS)


@pytest.fixture(scope="module", params=families())
def family(request, tmp_path_factory):
    """Return (HF's model, make), where make(batch_size) returns an engine with its weights."""
    model = make_model(request.param, tied=False, layers=2, seed=5).eval()
    path = save_folder(tmp_path_factory.mktemp(request.param), model)
    folder, tensors = HFFolder(path), load_file(path / "model.safetensors")

    def make(batch_size, dtype=torch.float32):
        engine = TransformersEngine(folder, torch.device("cpu"), dtype, batch_size)
        engine.update_weights(tensors.items(), "7")
        return engine

    return model, make


def requests_of(lengths=(1, 190, 7, 2, 60, 7), siblings=4):
    """Return requests in mixed order: a request's prompt and seed do not depend on the others."""
    dice = random.Random(1)
    prompts = [tuple(dice.choices(range(3, 259), k=length)) for length in lengths]
    pairs = [(number, index) for index in range(siblings) for number in range(len(prompts))]
    return [Request(prompts[number], f"s/{number}/{index}") for number, index in pairs]


def deliveries(engine, requests, sampling=SAMPLING):
    return list(engine.generate(requests, sampling, Event()))


def sample(engine, requests, sampling=SAMPLING):
    """Return all completions in the requests' order."""
    found = {}
    for delivery in deliveries(engine, requests, sampling):
        assert not set(found) & set(delivery)
        found |= delivery
    return [found[number] for number in range(len(requests))]


@torch.no_grad()
def exact(model, prompt, ids, temperature=1.0):
    """Return log-probabilities [tokens, vocabulary] by HF's pass over the complete, unpadded sequence."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def assert_exact(model, request, completion, temperature, skip=0):
    expected = exact(model, request.prompt_ids, completion.ids, temperature)
    chosen = expected[torch.arange(len(completion.ids)), completion.ids].tolist()
    assert completion.logprobs[skip:] == pytest.approx(chosen[skip:], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_tokens_and_logprobs_are_those_of_full_forward_passes(family, batch_size):
    # Each sampled token is where the exact cumulative distribution exceeds its uniform number.
    model, make = family
    requests = requests_of()
    completions = sample(make(batch_size), requests)
    assert len({len(completion.ids) for completion in completions}) > 8
    near_ties = []
    for request, completion in zip(requests, completions, strict=True):
        assert_exact(model, request, completion, 0.9)
        masses = exact(model, request.prompt_ids, completion.ids, 0.9).exp().cumsum(-1)
        for place, uniform in enumerate(uniforms(request.seed, SAMPLING.max_tokens)[: len(completion.ids)]):
            expected = int((masses[place] <= uniform * masses[place, -1]).sum())
            if expected != completion.ids[place]:
                near_ties.append((request.seed, place))
                assert (masses[place] / masses[place, -1] - uniform).abs().min() < TOLERANCE
    assert len(near_ties) <= 1, near_ties


def test_onednn_multiplies_with_the_newest_weights(family, monkeypatch):
    # All linear layers of the model, also those that are too small to gain by it.
    monkeypatch.setattr(linear, "_WORTH", 0)
    model, make = family
    engine, requests = make(5), requests_of()
    other = make_model(model.config.model_type, tied=False, layers=2, seed=6).eval()
    stored = {
        name: tensor
        for parameter in other.named_parameters()
        for name, tensor in engine.architecture.stored_tensors(*parameter)
    }
    for expected, version in ((model, "7"), (other, "8")):
        for request, completion in zip(requests, sample(engine, requests), strict=True):
            assert_exact(expected, request, completion, 0.9)
            assert completion.versions[0][0] == version
        layers = [one for one in engine.model.modules() if isinstance(one, linear.OneDNNLinear)]
        assert len(layers) >= 9 and all(layer.copies is not None for layer in layers)
        engine.update_weights(stored.items(), "8")


@pytest.mark.parametrize("rows", [1, 30, 400])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_exact_below_and_above_the_size_that_gains(rows, has_bias):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(384, 256, bias=has_bias)
    inputs = torch.randn(2, rows, 384, generator=generator)
    with torch.no_grad():
        ours = linear.OneDNNLinear(layer)
        found = ours(inputs)
        expected = layer.double()(inputs.double()).float()
    assert (ours.copies is not None) == (2 * rows * 384 * 256 >= 2**22)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_greedy_tokens_are_the_most_probable_ones(family, batch_size):
    model, make = family
    requests = requests_of()
    for request, completion in zip(
        requests, sample(make(batch_size), requests, SAMPLING._replace(temperature=0.0)), strict=True
    ):
        assert_exact(model, request, completion, 1.0)
        assert exact(model, request.prompt_ids, completion.ids).argmax(-1).tolist() == completion.ids


def test_other_compositions_give_the_same_tokens(family):
    # Alone, in fives with waiting siblings, all at once, in another order, and without some.
    _, make = family
    requests = requests_of()
    alone = {one.seed: sample(make(1), [one])[0] for one in requests}
    for batch_size, chosen in ((5, requests), (64, requests), (5, requests[::-1]), (5, requests[3::2])):
        for request, completion in zip(chosen, sample(make(batch_size), chosen), strict=True):
            expected = alone[request.seed]
            assert completion.ids == expected.ids  # no near-tie among these 24 samples
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE, rel=0)


def test_partial_rollouts_continue_as_if_they_had_not_been_cut(family):
    # Cut after different numbers of tokens; one has no start, one is complete by the limit.
    model, make = family
    requests = requests_of()
    complete = sample(make(64), requests, SAMPLING._replace(stop_ids=NEVER))
    started = []
    for number, (request, completion) in enumerate(zip(requests, complete, strict=True)):
        cut = min(number * 2, SAMPLING.max_tokens)
        start = completion._replace(
            ids=completion.ids[:cut],
            logprobs=completion.logprobs[:cut],
            versions=[("6", 0, cut)],
            finish_reason="abort",
        )
        started.append(request._replace(start=start if cut else None))
    for request, expected, found in zip(
        started, complete, sample(make(5), started, SAMPLING._replace(stop_ids=NEVER)), strict=True
    ):
        cut = len(request.start.ids) if request.start else 0
        assert found.ids == expected.ids and found.finish_reason == expected.finish_reason == "length"
        assert_exact(model, request, found, 0.9, skip=cut)
        new = [("7", cut, len(found.ids))] if cut < len(found.ids) else []
        assert found.versions == ([("6", 0, cut)] if cut else []) + new


def test_bfloat16_is_as_exact_as_transformers(family):
    # Mean error of the log-probabilities against fp32: the weights' and activations' rounding dominates.
    model, make = family
    requests = requests_of()
    rounded = make_model(model.config.model_type, tied=False, layers=2, seed=5).eval().bfloat16()
    ours, theirs = [], []
    for request, completion in zip(requests, sample(make(5, torch.bfloat16), requests), strict=True):
        places = torch.arange(len(completion.ids)), torch.tensor(completion.ids)
        expected = exact(model, request.prompt_ids, completion.ids, 0.9)[places]
        ours.append((torch.tensor(completion.logprobs) - expected).abs())
        theirs.append((exact(rounded, request.prompt_ids, completion.ids, 0.9)[places] - expected).abs())
    assert 0 < torch.cat(ours).mean() < 1.3 * torch.cat(theirs).mean()


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_a_prompt_is_computed_once_and_free_rows_are_used(family):
    _, make = family
    engine, requests = make(8), requests_of(siblings=12)
    passes = []
    engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, arguments: passes.append(arguments[0].shape[1])
    )
    completions = sample(engine, requests)  # 72 requests in six waves of one prompt and a bit
    sampled = sum(len(completion.ids) - 1 for completion in completions)  # the first follows the prompt
    prompts = sum(map(len, {request.prompt_ids for request in requests}))
    assert sum(passes) == sampled + prompts


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_waiting_requests_enter_as_soon_as_rows_are_free(family, monkeypatch):
    # As many passes as a simulation of 8 rows that are refilled at once, per wave of 16.
    _, make = family
    monkeypatch.setattr(engines, "WAVE_BATCHES", 4)
    engine, requests = make(8), requests_of((5,), siblings=32)
    passes = []
    engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, arguments: passes.append(arguments[0].shape[1])
    )
    completions = sample(engine, requests)
    waiting, rows, expected = [len(completion.ids) - 1 for completion in completions], [], [5]
    while waiting or rows:
        while waiting and len(rows) < 8:
            rows += [left for left in [waiting.pop(0)] if left]
        expected += [len(rows)] if rows else []
        rows = [left - 1 for left in rows if left > 1]
    assert passes == expected


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_a_wave_has_complete_groups_where_they_fit(family):
    _, make = family
    requests = requests_of(lengths=(3, 4, 5, 6), siblings=3) + requests_of(lengths=(9,), siblings=20)
    sizes = [
        [len(requests[number].prompt_ids) for number in delivery]
        for delivery in deliveries(make(4), requests, SAMPLING._replace(max_tokens=1))
    ]
    assert sizes == [[3] * 3 + [4] * 3, [5] * 3 + [6] * 3, [9] * 8, [9] * 8, [9] * 4]


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_stop_is_read_between_waves(family):
    _, make = family
    requests = requests_of(lengths=(3, 4, 5), siblings=2)
    started = requests[5]._replace(start=sample(make(4), requests[5:], SAMPLING._replace(max_tokens=3))[0])
    requests[5] = started
    stop, found = Event(), {}
    for delivery in make(1).generate(requests, SAMPLING, stop):
        stop.set()
        found |= delivery
    finished = [number for number, completion in found.items() if completion.finish_reason != "abort"]
    assert [len(requests[number].prompt_ids) for number in finished] == [3, 3] and len(found) == 6
    assert found[5] == started.aborted() and found[5].ids
    assert all(found[number].ids == [] for number in range(5) if number not in finished)


class Killed(BaseException):
    """A kill in the middle of a pass."""


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"], indirect=True)
def test_twenty_kills_while_sampling_change_no_bit(family, monkeypatch):
    # Killed in a random pass, also in the middle of a wave; what was delivered before is kept, as the ledger
    # does, and the rest is requested again. Groups of 6 and of 20 requests, in waves of 10. oneDNN multiplies
    # from two to four rows on, depending on the matrix.
    _, make = family
    requests = requests_of(siblings=6) + [
        Request(requests_of()[1].prompt_ids, f"more/{index}") for index in range(14)
    ]
    engine, dice, kills = make(5), random.Random(3), 0
    monkeypatch.setattr(linear, "_WORTH", 4 * 64 * 64)
    expected = dict(enumerate(sample(engine, requests)))
    left = 0

    def die_later():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    monkeypatch.setattr(waves, "beat", die_later)
    while kills < 20:
        found = {}
        while len(found) < len(requests):
            missing = [number for number in range(len(requests)) if number not in found]
            left = dice.randrange(1, 200)
            try:
                for delivery in engine.generate([requests[number] for number in missing], SAMPLING, Event()):
                    found |= {missing[number]: completion for number, completion in delivery.items()}
            except Killed:
                kills += 1
        assert found == expected  # ids and log-probabilities


def test_a_process_killed_while_sampling_resumes(tmp_path):
    # SIGKILL when the ledger has the first of step 2's four waves; the run ends with the same bits.
    def start(folder):
        overrides = ["train.steps=2", f"logging.dir={folder}", "evaluation.every=0"]
        overrides += ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.batch_size=2"]
        overrides += ["checkpoint.save_interval=1"]
        command = [sys.executable, "-m", "megatron_srpo", "train", "examples/quickstart/config.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(
                [*command, *overrides], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    assert start(tmp_path / "uninterrupted").wait(200) == 0, (tmp_path / "log").read_text()
    process, ledger = start(tmp_path / "run"), tmp_path / "run/ledger/step_000002.rank_00000.jsonl"
    until = time.monotonic() + 200
    while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < until:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert len(ledger.read_text().splitlines()) < 4
    assert not (tmp_path / "run/rollouts/step_000002.jsonl").exists()
    assert start(tmp_path / "run").wait(200) == 0, (tmp_path / "log").read_text()
    found, expected = comparable(tmp_path / "run"), comparable(tmp_path / "uninterrupted")
    assert found == expected
