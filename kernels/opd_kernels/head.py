"""A module in the place of a model's lm_head, inside whose forward all work on the vocabulary is done.

Parameter-sharding runtimes (ZeRO-3, FSDP2) gather a module's weight when its forward is entered and again when the backward pass
reaches its outputs. Work on the head's weight therefore has to run inside this module's forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from opd_kernels.types import HeadConstants


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadView:
    """What a request sees of the head: its gathered parameters and constants."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    vocab_size: int | None

    def keywords(self) -> dict[str, Any]:
        """Keywords of selected_logprobs, fused_sparse_loss and topk_logprobs."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "vocab_size": self.vocab_size}

    def constants(self) -> HeadConstants:
        """One side's constants of dense_divergence."""
        return HeadConstants(bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale)


class Head(nn.Module):
    """Holds the Parameters of an lm_head under the same names; `forward(hidden, request)` runs a request on them.

    softcap and logit_scale are what the *model* applies after its lm_head (Gemma, Cohere): plain logits leave them out, a request
    gets them. vocab_size is the number of valid columns of a padded head.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size

    @classmethod
    def from_lm_head(
        cls, lm_head: nn.Module, *, softcap: float | None = None, logit_scale: float = 1.0, vocab_size: int | None = None
    ) -> Self:
        """Takes over weight and bias (the same Parameter objects: tied and frozen heads stay so) of a linear layer.

        Raises ValueError for a layer that is more than its weight and bias, such as one with a LoRA adapter.
        """
        if not isinstance(lm_head, nn.Module) or isinstance(lm_head, nn.Embedding):
            raise ValueError(f"lm_head is a {type(lm_head).__name__}; it must be a linear layer, such as model.get_output_embeddings()")
        weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
        others = sorted(set(dict(lm_head.named_parameters())) - {"weight", "bias"})
        if not isinstance(weight, nn.Parameter) or weight.dim() > 2 or others:
            raise ValueError(
                f"lm_head is a {type(lm_head).__name__} with parameters {sorted(dict(lm_head.named_parameters()))}; "
                "it must be a linear layer with weight and at most a bias (merge or drop an adapter on the head)"
            )
        return cls(weight, bias, softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size)

    def forward(self, hidden: Tensor, request: Callable[[Tensor, HeadView], Any] | None = None) -> Any:
        """Plain products hidden @ weight.T + bias without a request, else `request(hidden, view)`.

        A request returns tensors in tuples, lists or dicts: sharding runtimes look for the backward pass's start in those, and would
        miss a tensor inside another object. Raises ValueError for anything else.
        """
        if request is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if not callable(request):
            raise ValueError(f"request is a {type(request).__name__}; it must be a function (hidden, view) -> tensors, or None for plain logits")
        view = HeadView(weight=self.weight, bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale, vocab_size=self.vocab_size)
        result = request(hidden, view)
        _check_visible(result)
        return result


def _check_visible(result: Any) -> None:
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, tuple | list):
        for part in result:
            _check_visible(part)
    elif result is not None and not isinstance(result, torch.Tensor):
        raise ValueError(f"the request returned a {type(result).__name__}; return tensors, or tuples, lists or dicts of tensors")
