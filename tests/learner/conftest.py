"""DeepSpeed must not look for an accelerator; one thread keeps sums in one order."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402

torch.set_num_threads(1)
