"""One step of a run in one file: rollouts, scores, weights before it and what it did. Safetensors with JSON in the header; nothing is unpickled.

Legend: B answers, T completion tokens of one, D hidden size, V vocabulary.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from opd_kernels import HeadView
from opd_rollout.types import Completion, TokenScores
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd.types import Judged, Meter, Prepared, Prompt, Sample, Verdict

FORMAT = 1
HEADER = "opd_bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did: its meters, why no update was applied (or ""), and the name of the weights that it left behind."""

    meters: Mapping[str, Meter]
    skipped: str
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Step `step` (counted from 1) of run `run`.

    recipe: resolved, as JSON. config: the model's config.json. vocab_size, pad_id: what the learner took from the tokenizer. last: the metrics
    that schedules read. views: signal -> the context ids of each answer (None: no view). hidden: signal -> the teacher's final hidden states
    [T, D] of each answer (None without a view), from which any support can be scored; empty where they were left out. heads: signal -> the head
    behind them. frozen: parameters that are not trained. learner: masters, optimiser and average before the step; both empty in a bundle that
    holds the weights' name (`before`) alone. equals_run: whether the step, done again, gave the numbers in the run's metrics. threads: of torch,
    which order its sums.
    """

    run: str
    step: int
    recipe: Mapping[str, Any]
    config: str
    vocab_size: int
    pad_id: int
    last: Mapping[str, float]
    samples: Sequence[Sample]
    views: Mapping[str, Sequence[Sequence[int] | None]]
    hidden: Mapping[str, Sequence[Tensor | None]]
    heads: Mapping[str, HeadView]
    frozen: Mapping[str, Tensor]
    learner: Mapping[str, Any]
    before: str
    outcome: Outcome
    equals_run: bool
    threads: int
    packages: Mapping[str, str]


RECORDS: Mapping[str, type] = {
    record.__name__: record for record in (Bundle, Outcome, Sample, Judged, Prompt, Completion, Verdict, Prepared, TokenScores, HeadView, Meter)
}


def weights_name(named: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits of names, types and bits: equal for bitwise equal weights only."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write the file whole or not at all."""
    tensors: dict[str, Tensor] = {}
    content = json.dumps({"format": FORMAT, "bundle": encode(bundle, tensors)}, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    save_file(tensors, str(scratch), metadata={HEADER: content})
    scratch.replace(path)


def read_bundle(path: Path) -> Bundle:
    """The bundle in a file. Raises ValueError for anything else than a bundle of this format."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; opd bundle RUN step=N writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ValueError(f"{path} is a safetensors file, but no bundle; opd bundle RUN step=N writes one")
            content = json.loads(header)
            if content["format"] != FORMAT:
                raise ValueError(f"{path} has bundle format {content['format']}, this version reads {FORMAT}: use the version that wrote it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        bundle = decode(content["bundle"], tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a bundle ({type(error).__name__}: {error}); was it copied whole?") from None
    if not isinstance(bundle, Bundle):
        raise ValueError(f"{path} holds a {type(bundle).__name__}, not a bundle")
    return bundle


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for plain values, mappings, sequences and the records in RECORDS; tensors are put into `tensors` and named."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        assert RECORDS.get(type(value).__name__) is type(value), f"{type(value).__name__} is no record of a bundle"
        inner = {field.name: encode(getattr(value, field.name), tensors) for field in fields(value)}
        return {"record": type(value).__name__, "fields": inner}
    if isinstance(value, Mapping):
        return {"map": [[key, encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [encode(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    assert value is None or isinstance(value, str | int | float), f"a {type(value).__name__} has no place in a bundle"
    return value


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given; sequences come back as tuples."""
    if isinstance(value, list):
        return tuple(decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "map" in value:
        return {key: decode(item, tensors) for key, item in value["map"]}
    if "float" in value:
        return float(value["float"])
    return RECORDS[value["record"]](**{name: decode(item, tensors) for name, item in value["fields"].items()})


def pack(value: Any) -> dict[str, Any]:
    """JSON values from which `unpack` makes the same again, bit for bit."""
    tensors: dict[str, Tensor] = {}
    content = encode(value, tensors)
    packed = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), base64.b64encode(_bytes(tensor)).decode()]
        for name, tensor in tensors.items()
    }
    return {"content": content, "tensors": packed}


def unpack(plain: Mapping[str, Any]) -> Any:
    """What `pack` was given; sequences come back as tuples."""
    tensors = {}
    for name, (dtype, shape, data) in plain["tensors"].items():
        raw = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        tensors[name] = raw.view(getattr(torch, dtype)).reshape(shape)
    return decode(plain["content"], tensors)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
