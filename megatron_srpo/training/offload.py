"""Tensors that wait in host memory while their device's memory is needed: in other phases of a step, or by
another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage


class _Stay(NamedTuple):
    size: int  # bytes on the device
    copy: Tensor | None  # [size] uint8 on the host, pinned where there is CUDA; None: nothing is kept


class HostMemory:
    """Parks tensors' memory on the host and fetches it back, in place.

    It works on whole storages: every view of a parked tensor stays a tensor, has no memory meanwhile, and is
    whole again afterwards, bit for bit. What is parked or fetched already is left alone. Host copies are kept
    for the next stay.
    """

    def __init__(self):
        self._stays: dict[int, _Stay] = {}

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor], keep: bool = True) -> None:
        """Free the memory of `tensors`. keep: False forgets their values: `fetch` gives zeros."""
        leaving, is_cuda = [], False
        for storage in _storages(tensors):
            if size := storage.nbytes():
                is_cuda = storage.device.type == "cuda"
                stay = self._stays.get(storage._cdata)
                if stay is None or stay.size != size or (stay.copy is not None) != keep:
                    stay = _Stay(
                        size, torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda) if keep else None
                    )
                if keep:
                    stay.copy.copy_(_bytes(storage, size), non_blocking=True)
                self._stays[storage._cdata] = stay
                leaving.append(storage)
        if is_cuda:
            torch.cuda.synchronize()  # the copies are whole before anyone reads them
        for storage in leaving:
            storage.resize_(0)

    @torch.no_grad()
    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """Give `tensors` their memory and values back."""
        for storage in _storages(tensors):
            if storage.nbytes() == 0 and (stay := self._stays.get(storage._cdata)) is not None:
                storage.resize_(stay.size)
                content = _bytes(storage, stay.size)
                content.zero_() if stay.copy is None else content.copy_(stay.copy, non_blocking=True)

    def values(self, tensor: Tensor) -> Tensor:
        """`tensor`, or what it holds as a view of the host's copy while it is parked."""
        stay = self._stays.get(tensor.untyped_storage()._cdata)
        if stay is None or stay.copy is None or tensor.untyped_storage().nbytes():
            return tensor
        return stay.copy.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _storages(tensors: Iterable[Tensor]) -> Iterator[UntypedStorage]:
    """Each once."""
    return iter(
        {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}.values()
    )


def _bytes(storage: UntypedStorage, size: int) -> Tensor:
    """[size] uint8, the storage's own memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,))
