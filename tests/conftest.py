"""Before anything imports Triton: without a GPU its kernels are interpreted (tests/vocab_parallel/test_triton.py).

With one, fp32 products are fp32: NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which rounds their factors to 10 bits.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.set_float32_matmul_precision("highest")
