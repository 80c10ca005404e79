"""One thread: the tensors here are small, and more threads than free cores are much slower."""

import torch

torch.set_num_threads(1)
