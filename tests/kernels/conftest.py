"""One thread: the tensors here are small, and more threads than free cores are much slower.

On a GPU, `OPD_KERNEL_TESTS_ON=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 pytest tests/kernels/test_triton_*.py` makes every tensor there and
compiles the Triton kernels instead of interpreting them (test_triton_vocab_parallel needs CPU ranks and stays as it is).
"""

import os

import torch

torch.set_num_threads(1)
if os.environ.get("OPD_KERNEL_TESTS_ON") == "cuda":
    torch.set_default_device("cuda")

    class Generator(torch.Generator):
        def __new__(cls, device: str = "cuda") -> torch.Generator:
            return super().__new__(cls, device)

    torch.Generator = Generator
