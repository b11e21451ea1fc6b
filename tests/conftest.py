"""Before anything imports Triton: without a GPU its kernels are interpreted (tests/vocab_parallel/test_triton.py)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
