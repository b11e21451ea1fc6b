"""Implement in plain torch the part of sgl_kernel that SGLang 0.5.23's CPU path calls.

The published wheel is for CUDA, or for CPUs with AMX.

Any other name can be imported and raises NotImplementedError when it is called.
"""

import torch

__version__ = "0.4.10"
_MASK = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len=None):
    """Set req_to_token[request, start:end] to the next (end - start) cache places, request by request."""
    for place, request, first, last in _places(req_pool_indices, start, end):
        req_to_token[request, first:last] = out_cache_loc[place].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len=None):
    """Copy the requests' places in the cache, one request after the other, into out_cache_loc."""
    for place, request, first, last in _places(req_pool_indices, start, end):
        out_cache_loc[place] = req_to_token[request, first:last].to(out_cache_loc.dtype)


def _places(requests, starts, ends):
    offset = 0
    for request, first, last in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=False):
        yield slice(offset, offset + last - first), request, first, last
        offset += last - first


def _times(a, factor):
    """Return a · factor modulo 2³² in int64 without overflow."""
    return ((a & 0xFFFF) * factor + ((((a >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def _rotated(a, bits):
    return ((a << bits) | (a >> (32 - bits))) & _MASK


def _murmur_hash32(seed, positions, col_indices):
    """Return MurmurHash3 (32 bits) for every row and column.

    It hashes (low word of seed, high word, position, column).
    """
    seed, positions, columns = seed.long()[:, None], positions.long()[:, None], col_indices.long()[None, :]
    state = torch.zeros_like(seed)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions & _MASK, columns & _MASK):
        state = state ^ _times(_rotated(_times(word, 0xCC9E2D51), 15), 0x1B873593)
        state = (_rotated(state, 13) * 5 + 0xE6546B64) & _MASK
    state = state ^ 16
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not part of the CPU stubs")

    return absent
