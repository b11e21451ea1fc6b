"""megatron-core behind the CPU shim: all other modules import its names from here."""

from typing import Any

import torch

from megatron_srpo.distributed import cpu_shim
from megatron_srpo.distributed.startup import without_packages

cpu_shim.install()
_UNUSED = ["wandb", "torch.utils.tensorboard"]  # for core's own logs
if not torch.cuda.is_available():
    _UNUSED.append("triton")

# ruff: noqa: E402, F401
with without_packages(*_UNUSED):
    import megatron.core.parallel_state as _parallel_state
    import megatron.core.tensor_parallel as tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

if not hasattr(moe_utils, "te_general_gemm"):  # core 0.16's router reads it without Transformer Engine, too
    moe_utils.te_general_gemm = None

parallel_state: Any = _parallel_state  # its annotations allow a group to be an int, a list or None
