"""Vocabulary-sized operations of distillation and reinforcement learning that never build a [tokens, vocabulary] tensor."""

from opd_kernels.divergences import forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl
from opd_kernels.head import Head, HeadView
from opd_kernels.operations import dense_divergence, fused_sparse_loss, selected_logprobs, topk_logprobs
from opd_kernels.types import PAD_LOGP, Divergence, HeadConstants, SelectedLogprobs, TopkLogprobs

__all__ = [
    "PAD_LOGP",
    "Divergence",
    "Head",
    "HeadConstants",
    "HeadView",
    "SelectedLogprobs",
    "TopkLogprobs",
    "dense_divergence",
    "forward_kl",
    "fused_sparse_loss",
    "jsd",
    "reverse_kl",
    "selected_logprobs",
    "skew_forward_kl",
    "skew_reverse_kl",
    "topk_logprobs",
]
