"""Models without weights: the sizes of public models that ship with the project, made smaller by a factor where asked, and tokenizers for them."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from opd.config.choices import nearest
from opd.config.load import PACKAGED
from opd.text.standin import SMALLEST, end_ids, standin_tokenizer

ROW_MULTIPLE = 64
"""A scaled head has a multiple of so many rows, as real ones do: some rows are then beyond the tokenizer's entries."""


@lru_cache(maxsize=1)
def public_shapes() -> Mapping[str, Mapping[str, Any]]:
    """Name on the hub -> configuration values, "family", "tokens" and "parameters" among them."""
    path = next(path for root in PACKAGED if (path := root.parent / "models/shapes.yaml").is_file())
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: {**table["families"][own["family"]], **own} for name, own in table["models"].items()}


def find_shape(path: str) -> Mapping[str, Any]:
    """A public model's values. Raises ValueError with the nearest name."""
    shapes = public_shapes()
    if path not in shapes:
        raise ValueError(
            f"model.init=random: no sizes of {path!r} ship with the project{nearest(path, shapes)}; known: {', '.join(shapes)}; "
            "or give a folder with a config.json and a tokenizer"
        )
    return shapes[path]


def shape_config(path: str, scale: float = 1.0) -> Any:
    """The configuration of a public model, scaled. Raises ValueError for an unknown one."""
    values = dict(find_shape(path))
    tokenizer = shape_tokenizer(path, scale)
    for ours in ("family", "tokens", "parameters"):
        values.pop(ours)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    rows = config.vocab_size if scale == 1 else _up(len(tokenizer), ROW_MULTIPLE)
    return scaled(config, scale, rows=rows, tokenizer=tokenizer)


def shape_tokenizer(path: str, scale: float = 1.0) -> PreTrainedTokenizerBase:
    """The stand-in for a public model's tokenizer. Raises ValueError for an unknown model."""
    shape = find_shape(path)
    return _standin(shape["family"], max(SMALLEST, round(shape["tokens"] * scale)))


@lru_cache(maxsize=4)
def _standin(family: str, size: int) -> PreTrainedTokenizerBase:
    return standin_tokenizer(family, size)


def shape_generation(path: str, scale: float = 1.0) -> GenerationConfig:
    """What a public model's generation config says of the end of an answer."""
    tokenizer = shape_tokenizer(path, scale)
    return GenerationConfig(eos_token_id=end_ids(find_shape(path)["family"], tokenizer), pad_token_id=tokenizer.pad_token_id)


def scaled(config: Any, scale: float, *, rows: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """A copy with layers and widths times `scale`, at least one layer, its family kept; the ratio of queries to keys and values stays.

    rows: of the head; None keeps them. tokenizer: whose special ids the configuration names. Parameters go with about the cube of `scale`.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if tokenizer is not None:
        text.pad_token_id, text.eos_token_id, text.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    if rows is not None:
        text.vocab_size = rows
    if scale == 1:
        return config
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = max(1, round(groups * scale))
    queries = kept * (heads // groups)
    narrow = max(16, _near(heads * head_dim * scale / queries, 8))
    text.num_hidden_layers = max(1, round(text.num_hidden_layers * scale))
    text.num_key_value_heads, text.num_attention_heads = kept, queries
    text.hidden_size = max(queries * 8, _near(text.hidden_size * scale / queries, 8) * queries)
    text.intermediate_size = max(32, _near(text.intermediate_size * scale, 8))
    if getattr(text, "head_dim", None):
        text.head_dim = narrow
    if getattr(text, "query_pre_attn_scalar", None):
        text.query_pre_attn_scalar = narrow
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[: text.num_hidden_layers]
    return config


def _near(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def _up(value: int, multiple: int) -> int:
    return -(-(value + 1) // multiple) * multiple
