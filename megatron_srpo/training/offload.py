"""Offload tensors to host memory while another phase of a step, or another process, needs the device."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage


class _Offloaded(NamedTuple):
    size: int  # bytes on the device
    copy: Tensor | None  # [size] uint8 on the host, pinned with CUDA; None: the values are not kept


class HostMemory:
    """Host copies of offloaded tensors; onloading restores the tensors in place, bit for bit.

    Complete storages are offloaded, so views of an offloaded tensor have no memory either. Host buffers are
    reused.
    """

    def __init__(self) -> None:
        self._offloaded: dict[int, _Offloaded] = {}

    @torch.no_grad()
    def offload(self, tensors: Iterable[Tensor], keep: bool = True) -> None:
        """Free the device memory of `tensors`; without `keep`, onloading fills them with zeros."""
        freed: list[UntypedStorage] = []
        is_cuda = False
        for storage in _storages(tensors):
            if size := storage.nbytes():
                is_cuda = storage.device.type == "cuda"
                entry = self._offloaded.get(storage._cdata)
                if entry is None or entry.size != size or (entry.copy is not None) != keep:
                    copy = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda) if keep else None
                    entry = _Offloaded(size, copy)
                if entry.copy is not None:
                    entry.copy.copy_(_bytes(storage, size), non_blocking=True)
                self._offloaded[storage._cdata] = entry
                freed.append(storage)
        if is_cuda:
            torch.cuda.synchronize()  # the copies must be complete before the memory is freed
        for storage in freed:
            storage.resize_(0)

    @torch.no_grad()
    def onload(self, tensors: Iterable[Tensor]) -> None:
        """Restore the device memory and values of `tensors`."""
        for storage in _storages(tensors):
            entry = self._offloaded.get(storage._cdata)
            if storage.nbytes() == 0 and entry is not None:
                storage.resize_(entry.size)
                content = _bytes(storage, entry.size)
                if entry.copy is None:
                    content.zero_()
                else:
                    content.copy_(entry.copy, non_blocking=True)

    def values(self, tensor: Tensor) -> Tensor:
        """Return `tensor` or, while it is offloaded, the same view of the host copy."""
        entry = self._offloaded.get(tensor.untyped_storage()._cdata)
        if entry is None or entry.copy is None or tensor.untyped_storage().nbytes():
            return tensor
        copy = entry.copy.view(tensor.dtype)
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _storages(tensors: Iterable[Tensor]) -> Iterator[UntypedStorage]:
    """Yield the tensors' storages, each one once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    yield from {storage._cdata: storage for storage in storages}.values()


def _bytes(storage: UntypedStorage, size: int) -> Tensor:
    content: Any = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return content.set_(storage, 0, (size,))
