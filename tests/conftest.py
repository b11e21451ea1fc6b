"""Before anything imports Triton: without a GPU its kernels are interpreted
(tests/vocab_parallel/test_triton.py).

With one, fp32 products are fp32: NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which rounds their
factors to 10 bits.
"""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.set_float32_matmul_precision("highest")


def pytest_collection_finish():
    """What has been imported by now is not garbage: every run of a trainer looks for some when it ends, 0.3
    s each time.
    """
    gc.freeze()


def pytest_unconfigure():
    """At the end of the process it is."""
    gc.unfreeze()
