"""The student as one module: an unmodified Hugging Face backbone and the vocabulary head, in one forward pass.

Legend: R rows, S tokens a row, N completion tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

from opd_kernels import Head, HeadView
from opd_rollout.backbone import head_of, hidden_states
from opd_rollout.layout import TokenLayout
from torch import Tensor, nn


class Policy(nn.Module):
    """`model` (a Hugging Face causal language model) with its lm_head replaced by a Head of the same Parameters.

    Parameter names stay the model's own under the prefix "model.". Dropout is switched off: the probabilities that are trained are
    those that were sampled.
    """

    def __init__(self, model: nn.Module, *, vocab_size: int | None = None, gradient_checkpointing: bool = False) -> None:
        """vocab_size: valid ids of a padded head. Raises ValueError for a head that is more than weight and bias."""
        super().__init__()
        if not isinstance(model.get_output_embeddings(), Head):
            model.set_output_embeddings(head_of(model, vocab_size=vocab_size))
        remove_dropout(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()  # a hook on the embeddings, which only reentrant checkpoints need; without it generation is lean
        self.model = model

    @property
    def head(self) -> Head:
        return self.model.get_output_embeddings()

    def forward(self, layout: TokenLayout, request: Callable[[Tensor, HeadView], Any]) -> Any:
        """request(hidden states [N, D] that predict the completion tokens, head), run inside the head's forward."""
        hidden_ND = hidden_states(self.model, layout).index_select(0, layout.predict_at)
        return self.head(hidden_ND, request)


def remove_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
