"""Test the sizes that a layout must divide, and the keys that `megatron:` may set."""

import pytest
import torch
from tables import each_row

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import ModelSection, ParallelSection
from megatron_srpo.distributed.group_sizes import data_parallel_size
from megatron_srpo.model.families import architecture_of
from megatron_srpo.model.layout import check_layout, padded_vocab_size
from megatron_srpo.model.settings import transformer_config

DENSE = architecture_of(
    dict(model_type="qwen3", vocab_size=270, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    | dict(num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=1024)
)
EXPERTS = architecture_of(
    dict(model_type="qwen3_moe", vocab_size=270, hidden_size=64, intermediate_size=97, num_hidden_layers=4)
    | dict(num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=1024)
    | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48)
)


def refusal(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def core(settings: dict, architecture=DENSE):
    return transformer_config(architecture, ModelSection(hf_path="x"), ParallelSection(), settings)


def parallel(tensor=1, pipeline=1, virtual=None, **more) -> ParallelSection:
    return ParallelSection(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        **more,
    )


def test_layouts_that_divide():
    for sizes in ((4, 1), (1, 4), (1, 2, 2), (2, 2)):
        check_layout(DENSE, parallel(*sizes), {})


def test_experts_that_divide():
    # No layer has the dense width of 97.
    experts = dict(sequence_parallel=True, expert_model_parallel_size=8, expert_tensor_parallel_size=3)
    check_layout(EXPERTS, parallel(tensor=4, **experts), {})


@each_row(
    "architecture, sizes, named",
    [
        (DENSE, dict(tensor=3), ["tensor_model_parallel_size: 3", "num_attention_heads", "8"]),
        (DENSE, dict(tensor=8), ["tensor_model_parallel_size: 8", "num_key_value_heads", "4"]),
        (DENSE, dict(pipeline=3), ["pipeline_model_parallel_size", "4 layers", "3 stages"]),
        (DENSE, dict(pipeline=2, virtual=3), ["pipeline_model_parallel_size", "4 layers", "6 stages"]),
        (DENSE, dict(expert_model_parallel_size=2), ["expert_model_parallel_size: 2", "no experts"]),
        (EXPERTS, dict(expert_model_parallel_size=3), ["expert_model_parallel_size: 3", "num_experts", "8"]),
        (
            EXPERTS,
            dict(expert_model_parallel_size=2, expert_tensor_parallel_size=5),
            ["expert_tensor_parallel_size: 5", "moe_intermediate_size", "48"],
        ),
        (EXPERTS, dict(tensor=2), ["parallel.sequence_parallel", "set it to true"]),
    ],
)
def test_layouts_that_do_not_divide(architecture, sizes, named):
    message = refusal(check_layout, architecture, parallel(**sizes), {})
    assert all(part in message for part in named)


def test_megatrons_own_keys_place_layers_otherwise():
    check_layout(DENSE, parallel(pipeline=3), {"num_layers_in_first_pipeline_stage": 2})


def test_experts_are_shared_out_over_data_parallel_ranks():
    sizes = parallel(tensor=2, sequence_parallel=True, expert_model_parallel_size=4)
    assert (data_parallel_size(sizes, 8), data_parallel_size(sizes, 16)) == (4, 8)
    message = refusal(data_parallel_size, sizes, 12)
    named = ["expert_tensor_parallel_size × expert_model_parallel_size", "= 8", "12 processes"]
    assert all(part in message for part in named)


def test_padded_vocabulary():
    sizes = [(1, 1, 270), (1, 16, 272), (2, 16, 288), (2, 128, 512), (2, 135, 270)]
    for tensor, divisor, expected in sizes:
        assert padded_vocab_size(270, divisor, tensor) == expected


def test_what_every_run_sets():
    made = core({"recompute_granularity": "selective"})
    assert (made.hidden_dropout, made.attention_dropout, made.calculate_per_token_loss) == (0, 0, True)
    assert made.params_dtype == torch.float32 and made.recompute_granularity == "selective"


@each_row(
    "settings, named",
    [
        ({"recompute_granularty": "full"}, ["megatron.recompute_granularty", "mean recompute_granularity?"]),
        ({"zzzzzz": 1}, ["megatron.zzzzzz", "no such field"]),
        ({"num_layers": 2}, ["megatron.num_layers", "cannot be set here"]),
        ({"attention_dropout": 0.1}, ["megatron.attention_dropout", "depend on how the batch is split"]),
        ({"tensor_model_parallel_size": 2}, ["megatron.tensor_model_parallel_size", "cannot be set here"]),
        ({"calculate_per_token_loss": False}, ["megatron.calculate_per_token_loss", "cannot be set here"]),
        ({"bf16": True}, ["megatron.bf16", "cannot be set here"]),
        ({"cuda_graph_impl": "local"}, ["megatron.cuda_graph_impl", "packed sequences"]),
        ({"cp_comm_type": "p2p"}, ["megatron.cp_comm_type", "Transformer Engine"]),
        ({"recompute_granularity": "sometimes"}, ["megatron", "recompute"]),
        ({"moe_aux_loss_coeff": 0.01}, ["megatron.moe_aux_loss_coeff", "router losses"]),
        ({"moe_z_loss_coeff": 1e-3}, ["megatron.moe_z_loss_coeff", "router losses"]),
        (
            {"moe_router_load_balancing_type": "aux_loss"},
            ["megatron.moe_router_load_balancing_type", "router losses"],
        ),
    ],
)
def test_what_the_megatron_section_may_not_set(settings, named):
    message = refusal(core, settings, EXPERTS)
    assert all(part in message for part in named)


def test_small_numbers_in_the_megatron_section_are_numbers(tmp_path):
    # `1e-2` without a dot is text in YAML; every other section reads it as a number.
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {hf_path: x}\ntrain: {steps: 1}\nlogging: {dir: x}\nmegatron:\n  init_method_std: 1e-2\n"
    )
    assert core(load_config(file, []).megatron).init_method_std == 0.01
