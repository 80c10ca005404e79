"""An unmodified Hugging Face causal language model seen as two parts: hidden states, and a head.

Legend: R rows, S tokens a row, D hidden size, B rows, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels import Head, HeadView
from torch import Tensor, nn

from opd_rollout.layout import TokenLayout


def hidden_states(model: nn.Module, layout: TokenLayout) -> Tensor:
    """Final hidden states (after the last norm) of every position, flat [R*S, D]; gather completion rows with `layout.predict_at`.

    A padded layout runs without an attention mask: its pads stand on the right, where no real token of a causal model looks. In a
    packed one the restarting positions make the model build a mask that is block-diagonal.
    """
    decoder = model.get_decoder()
    output = decoder(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def head_of(model: nn.Module, *, vocab_size: int | None = None) -> Head:
    """The model's language-model head (the same Parameters) with what its family does after the product: soft-cap and logit scale.

    vocab_size: number of valid ids, where the head is padded beyond the tokenizer; None: every row. Returns the model's own Head where
    one has been installed. Raises ValueError when the model has no head, or has a Head of another vocabulary size.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    if isinstance(layer, Head):
        if vocab_size not in (None, layer.vocab_size):
            raise ValueError(f"vocab_size is {vocab_size}, but the installed head has {layer.vocab_size}; build both with the same number")
        return layer
    config = model.config.get_text_config()
    return Head.from_lm_head(layer, softcap=_softcap(config), logit_scale=_logit_scale(config), vocab_size=vocab_size)


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        return 1.0 / config.logits_scaling
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    return 1.0 if scale is None else scale


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> None:
    """Raises ValueError where head and hidden states do not reproduce the model's own logits, as in a family that `head_of` does not know.

    Costs one forward pass of two tokens.
    """
    device = head.weight.device
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device).unsqueeze(0)
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    valid = slice(0, head.vocab_size)
    found = head(hidden, dense_logits)[:, valid]
    gap = (found - expected[:, valid]).abs().max().item()
    scale = max(1.0, expected[:, valid].abs().max().item())
    if not gap <= scale * (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"{type(model).__name__} does more after its head than opd_rollout.backbone.head_of knows (logits differ by up to {gap:.2g}); "
            "add this family's constants there"
        )


def dense_logits(hidden: Tensor, view: HeadView) -> Tensor:
    """Logits [B, V] as sampled (fp32, or fp64 for fp64), -inf beyond the valid vocabulary; a request for Head.forward, for few rows."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        logits = torch.mm(hidden, view.weight.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, view.weight.T)
        logits = logits if logits.dtype == torch.float64 else logits.float()
    if view.bias is not None:
        logits = logits + view.bias
    if view.logit_scale != 1.0:
        logits = logits * view.logit_scale
    if view.softcap is not None:
        logits = torch.tanh(logits / view.softcap) * view.softcap
    if view.vocab_size is not None and view.vocab_size < logits.shape[-1]:
        logits[:, view.vocab_size :] = float("-inf")
    return logits


@contextmanager
def untracked(*models: nn.Module) -> Iterator[None]:
    """inference_mode, which takes 8 % off decoding a small model on a CPU; no_grad where hooks may leave tensors behind in a module.

    ZeRO-3 and its like gather weights into the module from hooks: made in inference_mode, they could not be trained afterwards. Buffers that a
    module makes anew as sequences grow (dynamic rotary positions) become ordinary tensors at the end.
    """
    try:
        with torch.no_grad() if any(map(has_hooks, models)) else torch.inference_mode():
            yield
    finally:
        for module in (each for model in models for each in model.modules()):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_inference():
                    module._buffers[name] = buffer.clone()


@dataclass(frozen=True, slots=True)
class Watch:
    """A forward pre-hook that leaves the pass as it is: `look` may count, raise, or copy new values into the module's own parameters."""

    look: Callable[[], object]

    def __call__(self, *_: object) -> None:
        self.look()


def watch(model: nn.Module, look: Callable[[], object]) -> None:
    """`look` is called before every forward pass of the model's decoder, and before every token that is decoded without one."""
    model.get_decoder().register_forward_pre_hook(Watch(look))


def watches(model: nn.Module) -> tuple[Watch, ...]:
    """What `watch` has put on the model's decoder."""
    return tuple(hook for hook in model.get_decoder()._forward_pre_hooks.values() if isinstance(hook, Watch))


def has_hooks(model: nn.Module) -> bool:
    """Whether anything but a Watch runs before, after or in the place of a forward pass of the model or of a part of it."""
    return nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks or "forward" in vars(module) or any(not isinstance(hook, Watch) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode, and those that were training back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
