"""Compare the embedded engine with Hugging Face's own forward pass and generate.

Those run one prompt at a time and without a cache.
"""

from collections import Counter
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, save_folder

from megatron_srpo.model.families import families
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import EngineFailed, Request, Sampling
from megatron_srpo.rollout.transformers.engine import TransformersEngine

NEVER = (269,)  # a stop id; the tests below make it improbable, or use others
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hf():
    """Return the model that Hugging Face's code runs.

    It has twice the usual noise: probabilities are far from uniform.
    """
    model = make_model(layers=2, seed=5).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
        model.model.embed_tokens.weight[NEVER[0]] = 0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf):
    return HFFolder(save_folder(tmp_path_factory.mktemp("engine"), hf))


def sample(engine, requests, sampling):
    """Return all completions, in the requests' order; each is yielded once."""
    completions = {}
    for done in engine.generate(requests, sampling, Event()):
        assert not set(done) & set(completions)
        completions.update(done)
    return [completions[number] for number in range(len(requests))]


@pytest.fixture(scope="module")
def engine_of(folder, hf):
    """Return engines by batch size, with the model's weights as version "7"."""

    def make(batch_size):
        engine = TransformersEngine(folder, CPU, torch.float32, batch_size)
        engine.update_weights(hf.named_parameters(), "7")
        return engine

    return make


def requests_of(lengths, seed="s"):
    generator = torch.Generator().manual_seed(0)
    return [
        Request(tuple(torch.randint(3, 259, (length,), generator=generator).tolist()), f"{seed}/{number}")
        for number, length in enumerate(lengths)
    ]


@torch.no_grad()
def exact_logprobs(hf, prompt, ids, temperature):
    """Return [tokens, vocabulary] at the response's positions, by one pass over the unpadded sequence."""
    logits = hf(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


LENGTHS = (1, 90, 7, 2, 33, 60, 5)


def nucleus_mass(logprobs, top_p):
    """Return the mass [n] of the smallest set of tokens that reaches top_p, for rows of logprobs [n, V]."""
    mass = logprobs.double().exp().sort(descending=True).values.cumsum(-1)
    return mass.masked_fill(mass < top_p, 2.0).min(-1).values if top_p < 1 else torch.ones(len(logprobs))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_logprobs_are_those_of_a_full_forward_pass(engine_of, hf, temperature, top_p):
    # Left padding, positions and cache: prompts of 1 to 90 tokens in a batch; top_p renormalises.
    requests = requests_of(LENGTHS)
    for request, completion in zip(
        requests, sample(engine_of(64), requests, Sampling(temperature, top_p, 15, NEVER)), strict=True
    ):
        assert len(completion.ids) == len(completion.logprobs) == 15
        expected = exact_logprobs(hf, request.prompt_ids, completion.ids, temperature)
        chosen = expected[torch.arange(15), completion.ids] - nucleus_mass(expected, top_p).log().float()
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=0, atol=1e-5)


def test_logprobs_stay_right_while_rows_finish(engine_of, hf):
    # A third of the vocabulary ends a response: the batch shrinks again and again.
    stops = tuple(range(0, 270, 3))
    requests = requests_of([1 + number % 40 for number in range(60)])
    completions = sample(engine_of(60), requests, Sampling(1.0, 1.0, 20, stops))
    assert len({len(completion.ids) for completion in completions}) > 5
    for request, completion in zip(requests, completions, strict=True):
        expected = exact_logprobs(hf, request.prompt_ids, completion.ids, 1.0)
        chosen = expected[torch.arange(len(completion.ids)), completion.ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=0, atol=1e-5)


def generate(hf, prompt, count, stops):
    """Return Hugging Face's greedy generation."""
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=count, eos_token_id=list(stops), pad_token_id=0)
    return hf.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_greedy_is_generate_token_for_token(engine_of, hf):
    requests = requests_of(LENGTHS)
    completions = sample(engine_of(3), requests, Sampling(0.0, 1.0, 12, NEVER))
    for request, completion in zip(requests, completions, strict=True):
        assert completion.ids == generate(hf, request.prompt_ids, 12, NEVER)
        chosen = exact_logprobs(hf, request.prompt_ids, completion.ids, 1.0)[torch.arange(12), completion.ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=0, atol=1e-5)


def test_greedy_stops_where_generate_stops(engine_of, hf):
    requests = requests_of(LENGTHS)
    unstopped = sample(engine_of(64), requests, Sampling(0.0, 1.0, 12, NEVER))
    stops = (unstopped[0].ids[4], unstopped[1].ids[7], NEVER[0])
    completions = sample(engine_of(64), requests, Sampling(0.0, 1.0, 12, stops))
    assert len(completions[0].ids) <= 5 and len(completions[1].ids) <= 8
    for request, completion in zip(requests, completions, strict=True):
        assert completion.ids == generate(hf, request.prompt_ids, 12, stops)


def test_a_sample_depends_on_prompt_and_seed_alone(engine_of):
    # The same prompt and seed give the same ids, whatever the batch size, the order and the neighbours.
    requests = requests_of([1 + 13 * number % 50 for number in range(24)])
    sampling = Sampling(1.0, 0.95, 12, tuple(range(0, 270, 9)))
    alone = sample(engine_of(1), requests, sampling)
    assert len({tuple(completion.ids) for completion in alone}) == 24
    for batch_size in (5, 64):
        engine = engine_of(batch_size)
        for numbers in (range(24), range(23, -1, -1), range(0, 24, 5)):
            together = sample(engine, [requests[number] for number in numbers], sampling)
            for number, completion in zip(numbers, together, strict=True):
                assert completion.ids == alone[number].ids
                assert completion.finish_reason == alone[number].finish_reason
                np.testing.assert_allclose(completion.logprobs, alone[number].logprobs, rtol=0, atol=1e-5)


def test_seed_decides(engine_of):
    engine, sampling = engine_of(64), Sampling(1.0, 1.0, 10, NEVER)
    prompt = requests_of([5])[0].prompt_ids
    first, again, other = sample(
        engine, [Request(prompt, "a"), Request(prompt, "a"), Request(prompt, "b")], sampling
    )
    assert first.ids == again.ids != other.ids


def test_a_higher_limit_continues_the_same_tokens(engine_of):
    engine, requests = engine_of(64), requests_of(LENGTHS)
    short, long = (sample(engine, requests, Sampling(1.0, 1.0, limit, NEVER)) for limit in (4, 9))
    assert [completion.ids for completion in short] == [completion.ids[:4] for completion in long]


def test_stop_token_is_kept_and_reasons_are_given(engine_of):
    engine, requests = engine_of(64), requests_of([4] * 100)
    stops = tuple(range(0, 270, 4))
    free = sample(engine, requests, Sampling(1.0, 1.0, 6, NEVER))
    stopped = sample(engine, requests, Sampling(1.0, 1.0, 6, stops))
    lengths = Counter()
    for unstopped, completion in zip(free, stopped, strict=True):
        first_stop = next((place for place, token in enumerate(unstopped.ids) if token in stops), None)
        assert unstopped.finish_reason == "length" and len(unstopped.ids) == 6
        assert completion.ids == (unstopped.ids if first_stop is None else unstopped.ids[: first_stop + 1])
        assert completion.finish_reason == ("length" if first_stop is None else "stop")
        assert len(completion.logprobs) == len(completion.ids)
        assert completion.versions == [("7", 0, len(completion.ids))]
        lengths[completion.finish_reason, len(completion.ids)] += 1
    assert lengths["length", 6] and lengths["stop", 6] and lengths["stop", 1]  # each case occurred


def expect(counts, probabilities):
    """Assert a chi-square within 5 standard deviations of its expectation; rare ids are pooled."""
    total = sum(counts.values())
    expected = np.asarray(probabilities, dtype=float) * total
    observed = np.array([counts[token] for token in range(len(expected))], dtype=float)
    often = expected >= 8
    observed = np.append(observed[often], observed[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert freedom >= 3 and statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.8, 0.95)])
def test_frequencies_are_the_probabilities(engine_of, hf, temperature, top_p):
    # 3000 first tokens after one prompt; under top_p they are the smallest set whose mass reaches it,
    # renormalised.
    prompt = requests_of([6])[0].prompt_ids
    requests = [Request(prompt, f"frequency/{number}") for number in range(3000)]
    completions = sample(engine_of(3000), requests, Sampling(temperature, top_p, 1, NEVER))
    logprobs = exact_logprobs(hf, prompt, [0], temperature)[0]
    probabilities = logprobs.double().exp().numpy()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1)] if top_p < 1 else order
    nucleus = np.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = Counter(completion.ids[0] for completion in completions)
    assert set(counts) <= set(kept.tolist())
    expect(counts, nucleus)
    for completion in completions[:100]:
        # top_p < 1 trained with a bias: the probabilities were not those of the distribution sampled from
        assert completion.logprobs[0] == pytest.approx(np.log(nucleus[completion.ids[0]]), abs=1e-5)


def test_later_tokens_are_sampled_from_their_own_distribution(engine_of, hf):
    # The second token, given the most frequent first one.
    prompt = requests_of([3])[0].prompt_ids
    requests = [Request(prompt, f"second/{number}") for number in range(4000)]
    completions = sample(engine_of(4000), requests, Sampling(0.8, 1.0, 2, NEVER))
    first, count = Counter(completion.ids[0] for completion in completions).most_common(1)[0]
    assert count > 300
    counts = Counter(completion.ids[1] for completion in completions if completion.ids[0] == first)
    expect(counts, exact_logprobs(hf, prompt, [first, 0], 0.8)[1].double().exp().numpy())


def test_tiny_top_p_is_greedy(engine_of):
    engine, requests = engine_of(64), requests_of(LENGTHS)
    greedy = sample(engine, requests, Sampling(0.0, 1.0, 8, NEVER))
    nucleus = sample(engine, requests, Sampling(1.0, 1e-6, 8, NEVER))
    assert [completion.ids for completion in nucleus] == [completion.ids for completion in greedy]


def test_no_requests(engine_of):
    assert sample(engine_of(4), [], Sampling(1.0, 1.0, 5, NEVER)) == []


def test_new_weights_are_sampled_from(engine_of):
    engine, requests, sampling = engine_of(64), requests_of(LENGTHS), Sampling(0.0, 1.0, 6, NEVER)
    other = make_model(layers=2, seed=9).eval()
    engine.update_weights(other.named_parameters(), "8")
    for request, completion in zip(requests, sample(engine, requests, sampling), strict=True):
        assert completion.ids == generate(other, request.prompt_ids, 6, NEVER)
        assert completion.versions == [("8", 0, len(completion.ids))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_is_not_sampled_from(engine_of, hf, temperature):
    engine = engine_of(4)
    engine.update_weights([(name, tensor * float("nan")) for name, tensor in hf.named_parameters()], "8")
    with pytest.raises(EngineFailed, match="NaN with weight version 8"):
        sample(engine, requests_of(LENGTHS), Sampling(temperature, 1.0, 5, NEVER))


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(96, 64)}),
            "model.layers.9.mlp.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(270, 64)}),
            "lm_head.weight",
        ),  # tied: no tensor of its own
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}), "model.norm.weight [65]"),
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"),
            "1 tensors did not arrive, first model.layers.1.",
        ),
        (lambda tensors: tensors.clear(), "did not arrive"),
    ],
)
def test_weight_streams_that_do_not_fit(engine_of, hf, change, named):
    engine = engine_of(4)
    tensors = dict(hf.named_parameters())
    change(tensors)
    with pytest.raises(ValueError) as caught:
        engine.update_weights(tensors.items(), "8")
    assert named in str(caught.value) and engine.version == "7"


def test_a_tensor_that_comes_twice(engine_of, hf):
    with pytest.raises(ValueError, match="model.norm.weight"):
        engine_of(4).update_weights([*hf.named_parameters(), ("model.norm.weight", torch.zeros(64))], "8")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Return (HF's mixture of experts, its folder, the folder's tensors).

    The folder has one tensor for each matrix of each expert; the model holds them fused.
    """
    model = make_model("qwen3_moe", tied=False, layers=2, seed=5).eval()
    path = save_folder(tmp_path_factory.mktemp("experts"), model)
    return model, HFFolder(path), load_file(path / "model.safetensors")


@pytest.mark.parametrize("family", families())
def test_every_family_takes_the_tensors_of_its_folder(tmp_path, family):
    # The names of files and exports; log-probabilities equal those of the saved model.
    model = make_model(family, tied=False, layers=2, seed=5).eval()
    folder = HFFolder(save_folder(tmp_path, model))
    engine = TransformersEngine(folder, CPU, torch.float32, 64)
    engine.update_weights(load_file(tmp_path / "model.safetensors").items(), "7")
    assert all(map(torch.equal, engine.model.parameters(), model.parameters()))
    requests = requests_of(LENGTHS)
    for request, completion in zip(
        requests, sample(engine, requests, Sampling(1.0, 1.0, 10, NEVER)), strict=True
    ):
        expected = exact_logprobs(model, request.prompt_ids, completion.ids, 1.0)
        chosen = expected[torch.arange(len(completion.ids)), completion.ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, rtol=0, atol=1e-5)


GATE, EXPERTS = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda tensors: tensors.pop(f"{EXPERTS}.7.up_proj.weight"), f"first {EXPERTS}.7.up_proj.weight"),
        (lambda tensors: tensors.pop(GATE), f"first {GATE}"),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.8.up_proj.weight": torch.zeros(48, 64)}),
            "experts.8.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.0.down_proj.weight": torch.zeros(48, 64)}),
            "down_proj.weight [48, 64]",
        ),
    ],
)
def test_expert_streams_that_do_not_fit(experts, change, named):
    _, folder, tensors = experts
    tensors = dict(tensors)
    change(tensors)
    with pytest.raises(ValueError) as caught:
        TransformersEngine(folder, CPU, torch.float32, 4).update_weights(tensors.items(), "8")
    assert named in str(caught.value)
