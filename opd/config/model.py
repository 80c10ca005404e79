"""The student of a recipe, and the machine that it is meant for: the keys `model` and `target`."""

from typing import Any, Literal

from pydantic import Field

from opd.config.base import Frozen, Positive


class LoRA(Frozen):
    """Low-rank adapters through peft; the frozen teacher is then the adapter switched off."""

    rank: Positive = Field(default=16, description="rank of the factors")
    alpha: float = Field(default=32.0, gt=0, description="scale numerator; the update is alpha / rank times B A")
    targets: str | list[str] = Field(default="all-linear", description="module names, or all-linear (never the head)")


class Model(Frozen):
    """The student."""

    path: str = Field(default="", description="Hugging Face folder or hub name; models/<name> inside the package is found too")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="random: fresh weights of the architecture in `path` or `shape`; for a hub name in models/shapes.yaml nothing is asked of "
        "the hub, and a byte-level tokenizer and made-up problems stand in",
    )
    scale: float = Field(default=1.0, gt=0, le=1, description="with init=random: layers and widths (and a stand-in's vocabulary) times this")
    shape: dict[str, Any] = Field(
        default={}, description="Qwen3 config values for a new model when `path` is empty (hidden_size, num_hidden_layers ...)"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="weights and activations; the head always computes in fp32")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(default="sdpa", description="attention kernel of the Hugging Face model")
    liger: bool = Field(default=False, description="Liger's fused norms, rotary embedding and MLP (needs a GPU; not run by the project so far)")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    lora: LoRA | None = Field(default=None, description="train low-rank adapters instead of all weights")
    vocabulary: Positive = Field(
        default=512, description="size of the byte-level BPE vocabulary trained from the data when the model has no tokenizer"
    )


class Target(Frozen):
    """The machine that `opd check` plans for, where it is not this one."""

    device: str = Field(default="", description="a100, h100, h200 or l40s, one a learner rank; empty: this machine's CPU")
