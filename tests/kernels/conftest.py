"""What holds for every kernel test, set before a test module is imported.

One thread: the tensors here are small, and more threads than free cores are much slower. Triton kernels are interpreted: the choice is
read when a kernel is decorated.
"""

import os

import torch

os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
