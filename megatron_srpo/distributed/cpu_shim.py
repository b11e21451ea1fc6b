"""CPU stand-ins for the CUDA calls of megatron-core. No other module knows about them.

megatron-core uses `torch.cuda.*` and `device="cuda"` in some thirty places. An import hook gives every
`megatron.core.*` module a view of `torch` whose `cuda` is the CPU. torch itself is unchanged, except for
`Tensor.cuda` and `Module.cuda`, which could only raise without CUDA.
"""

import contextlib
import functools
import importlib.abc
import inspect
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

_CPU = torch.device("cpu")
_FACTORIES = "tensor as_tensor empty zeros ones full arange linspace rand randn randint eye empty_strided"
_LIKE_FACTORIES = "empty_like zeros_like ones_like full_like rand_like randn_like"


def install() -> None:
    """Make `megatron.core` usable without CUDA. Raises RuntimeError if it is imported already."""
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before megatron_srpo.distributed.cpu_shim.install()")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    sys.meta_path.insert(0, _Finder())


class _View(types.ModuleType):
    def __init__(self, module: types.ModuleType, **replaced):
        super().__init__(module.__name__)
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class _NoStream:
    """A replacement for CUDA streams and events: on a CPU everything runs in order."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def _to_cpu(device: Any) -> Any:
    """Return the CPU for a CUDA device or its name, and anything else unchanged."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    return _CPU if isinstance(device, str) and device.startswith("cuda") else device


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _torch_view() -> _View:
    nothing = lambda *args, **kwargs: None  # noqa: E731
    no_context = lambda *args: contextlib.nullcontext()  # noqa: E731
    device = lambda *args, **kwargs: _to_cpu(torch.device(*args, **kwargs))  # noqa: E731
    cuda = _View(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.default_generator.manual_seed,
        Stream=_NoStream,
        Event=_NoStream,
        stream=no_context,
        current_stream=_NoStream,
        default_stream=_NoStream,
        set_stream=nothing,
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=no_context),
        memory_allocated=lambda *args: 0,
        max_memory_allocated=lambda *args: 0,
    )
    names = f"{_FACTORIES} {_LIKE_FACTORIES}".split()
    return _View(torch, cuda=cuda, device=device, **{name: _on_cpu(getattr(torch, name)) for name in names})


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that loads megatron.core modules as usual and patches each one after it has run."""

    def __init__(self):
        self.torch = _torch_view()

    def find_spec(self, name, path, target=None):
        if not name.startswith("megatron.core"):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._patch_after(spec.loader)
                return spec
        return None

    def _patch_after(self, loader) -> None:
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            self._patch(module)

        loader.exec_module = exec_module

    def _patch(self, module: Any) -> None:
        if vars(module).get("torch") is torch:
            module.torch = self.torch
        name = module.__name__.removeprefix("megatron.core.")
        if name == "jit":
            module.disable_jit_fuser()
        elif name == "tensor_parallel.random":
            module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
            module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        elif name == "tensor_parallel.mappings":
            uneven = _View(torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
            module.torch = _View(self.torch, distributed=uneven)
        elif name == "transformer.moe.moe_utils":
            module.maybe_move_tensor_to_cpu = _already_on_cpu
        elif name == "optimizer.clip_grads":
            module.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(module.clip_grad_by_total_norm_fp32)
        elif name == "optimizer.optimizer":
            optimizer = module.Float16OptimizerWithFloat16Params
            optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)
        elif name == "optimizer.distrib_optimizer":
            optimizer = module.DistributedOptimizer
            optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)
            module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True  # our Adam has Apex's state layout
            module.Adam = FusedAdam
        elif name == "optimizer":
            module.Adam, module.USING_PYTORCH_OPTIMIZER = FusedAdam, False


def _all_gather(outputs: list[Tensor], tensor: Tensor, group) -> None:
    """Gather tensors of unequal length, as NCCL can and experts need; gloo can only exchange them."""
    lengths, size = [len(output) for output in outputs], len(outputs)
    gathered = tensor.new_empty(sum(lengths), *tensor.shape[1:])
    dist.all_to_all_single(gathered, torch.cat([tensor] * size), lengths, [len(tensor)] * size, group=group)
    for output, part in zip(outputs, gathered.split(lengths), strict=True):
        output.copy_(part)


def _reduce_scatter(output: Tensor, tensors: list[Tensor], group) -> None:
    """Sum all ranks' tensors for this rank, of unequal length: the backward of `_all_gather`."""
    lengths, size = [len(tensor) for tensor in tensors], len(tensors)
    parts = output.new_empty(size, *output.shape)
    received = [len(output)] * size
    dist.all_to_all_single(parts.flatten(0, 1), torch.cat(tensors), received, lengths, group=group)
    torch.sum(parts, dim=0, out=output)


def _already_on_cpu(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Replace the token dispatcher's copy to the host, which makes numpy arrays only of CUDA tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _with_cuda_type_names(function):
    """Let `Tensor.type()` name CUDA types inside `function`: megatron-core's optimizers compare with them."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        original = torch.Tensor.type

        def cuda_type(self, dtype=None, *rest, **more):
            if dtype is None:
                return original(self).replace("torch.", "torch.cuda.", 1)
            return original(self, dtype, *rest, **more)

        tensor_class: Any = torch.Tensor
        tensor_class.type = cuda_type
        try:
            return function(*args, **kwargs)
        finally:
            tensor_class.type = original

    return wrapper


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Apex's state layout (the step in the group), which core's distributed checkpoints expect.

    θ ← θ - lr (wd θ + m̂ / (√v̂ + eps)) for every parameter with a gradient.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **_
    ):
        if not adam_w_mode:
            raise ValueError("the CPU's FusedAdam is AdamW only: decoupled_weight_decay must be true")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        super().__init__(params, defaults)

    # Without torch's decorator, which imports torch._dynamo (1 s) to exclude them from compiled code.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @override
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
                param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)
