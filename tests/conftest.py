"""Set up torch before anything imports Triton.

Without a GPU, Triton's kernels are interpreted (tests/vocab_parallel/test_triton.py). With one, fp32 products
are computed in fp32: NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which rounds their factors to 10
bits.
"""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.set_float32_matmul_precision("highest")


def pytest_collection_finish():
    """Exclude all objects imported so far from garbage collection.

    Every run of a trainer collects garbage when it ends, which takes 0.3 s each time with them.
    """
    gc.freeze()


def pytest_unconfigure():
    """Undo the freeze at the end of the process."""
    gc.unfreeze()
