"""The four public operations: validation, choice of backend, the empty batch. Shape suffixes as in `types`.

Keywords they share:
    temperature    a positive number, or [N] one a token; divides the logits after softcap
    bias           [V] added to the products; logit_scale multiplies, softcap bounds (see `types` for the formula)
    vocab_size     valid columns of the whole vocabulary; those at or beyond it are -inf (padded heads). None: every row of weight
    process_group  ranks that hold the other rows of a vocabulary split in rank order (shards may be uneven); every rank passes the
                   same hidden, ids and loss and receives the same result; the gradient of hidden is summed over the ranks
    vocab_start    global id of this rank's first row
    backend        auto, reference (dense), torch (chunked) or triton
    chunk_bytes    upper bound of the scratch; None: 64 to 128 MiB (160 MiB where whole rows are held) on the CPU, on CUDA 768 MiB
                   (2.5 GiB) or an eighth of the free memory. With None, tiles that wait for backward on the CPU also take the memory
                   of the weight's gradient: those of one call at a time, the newest
All accumulate in fp32 whatever the inputs (fp64 for fp64 inputs), repeat bitwise, and raise ValueError for input that does not fit.
"""

from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import choose_backend
from opd_kernels.checks import (
    check_constants,
    check_count,
    check_divergence,
    check_extras,
    check_flag,
    check_ids,
    check_included_ids,
    check_loss,
    check_loss_fn,
    check_options,
    check_projection,
    check_token_tensor,
)
from opd_kernels.types import (
    Divergence,
    HeadConstants,
    HeadInputs,
    LossFn,
    SelectedLogprobs,
    TopkLogprobs,
    accumulation_dtype,
)

PLAIN = HeadConstants()


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    tail: bool = True,
    entropy: bool = True,
    student_topk: int = 0,
    process_group: Any = None,
    vocab_start: int = 0,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> SelectedLogprobs:
    """Log-probabilities at ids [N, K] (-1 pads, duplicates and any order allowed), tail mass, log-normaliser and entropy.

    Equals log_softmax(hidden @ weight.T) gathered at ids. Differentiable in hidden [N, H], weight [V, H] and bias through logp,
    tail_logp, logz and entropy; costs four products forward and backward (three where weight takes no gradient), on the CPU
    less the tiles that wait for backward.
    `student_topk` > 0 adds the top-k ids and their log-probabilities as constants.
    """
    check_projection(hidden, weight)
    options = check_options(
        hidden,
        weight,
        HeadConstants(bias=bias, softcap=softcap, logit_scale=logit_scale),
        temperature=temperature,
        vocab_size=vocab_size,
        process_group=process_group,
        vocab_start=vocab_start,
        chunk_bytes=chunk_bytes,
    )
    total_columns = _total_columns(options.valid_columns, vocab_size, process_group)
    ids = check_ids(ids, hidden, total_columns)
    check_count("student_topk", student_topk, 0, total_columns)
    check_flag("tail", tail)
    check_flag("entropy", entropy)
    module = choose_backend(backend, hidden)
    if hidden.shape[0] == 0:
        return _empty_selected(hidden, weight, bias, ids, tail=tail, entropy=entropy, student_topk=student_topk)
    return module.selected_logprobs(hidden, weight, ids, options=options, tail=tail, entropy=entropy, student_topk=student_topk)


def fused_sparse_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    loss_fn: LossFn,
    extras: tuple[Tensor, ...] = (),
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    tail: bool = True,
    entropy: bool = True,
    student_topk: int = 0,
    process_group: Any = None,
    vocab_start: int = 0,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of a loss over tokens, with its gradients formed while the logits of a chunk are resident: three products, not four.

    `loss_fn(selected, *extras)` sees a chunk of C tokens: a SelectedLogprobs and the matching slices of `extras` (each [N, ...],
    constants). It returns the sum of the chunk's token losses and a dict of per-token tensors [C], which come back detached and
    joined to [N]. It must not mix tokens: pass normalisers and weights as extras. The loss is differentiable in hidden, weight and
    bias; nothing that loss_fn captures receives a gradient. Raises ValueError where the loss depends on none of what it was given.
    """
    check_projection(hidden, weight)
    options = check_options(
        hidden,
        weight,
        HeadConstants(bias=bias, softcap=softcap, logit_scale=logit_scale),
        temperature=temperature,
        vocab_size=vocab_size,
        process_group=process_group,
        vocab_start=vocab_start,
        chunk_bytes=chunk_bytes,
    )
    total_columns = _total_columns(options.valid_columns, vocab_size, process_group)
    ids = check_ids(ids, hidden, total_columns)
    check_count("student_topk", student_topk, 0, total_columns)
    check_flag("tail", tail)
    check_flag("entropy", entropy)
    check_extras(extras, hidden)
    check_loss_fn(loss_fn, extras)
    module = choose_backend(backend, hidden)
    if hidden.shape[0] == 0:
        empty = _empty_selected(hidden, weight, bias, ids, tail=tail, entropy=entropy, student_topk=student_topk)
        _, aux = check_loss(loss_fn(empty, *extras), 0)
        return _connected_zero(hidden, weight, bias), {name: value.detach() for name, value in aux.items()}
    return module.fused_sparse_loss(hidden, weight, ids, loss_fn, extras, options=options, tail=tail, entropy=entropy, student_topk=student_topk)


def topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    always_include: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    process_group: Any = None,
    vocab_start: int = 0,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> TopkLogprobs:
    """The k most likely ids of each token with their log-probabilities, the exact mass outside them, and the entropy; no gradient.

    Exact and deterministic: descending, ties to the lowest id. With `always_include` [N] the result has k + 1 columns: slot 0 is
    that id, slots 1 to k the top k in order, and -1 (a pad) stands where the included id occurs among them.
    """
    check_projection(hidden, weight)
    options = check_options(
        hidden,
        weight,
        HeadConstants(bias=bias, softcap=softcap, logit_scale=logit_scale),
        temperature=temperature,
        vocab_size=vocab_size,
        process_group=process_group,
        vocab_start=vocab_start,
        chunk_bytes=chunk_bytes,
    )
    total_columns = _total_columns(options.valid_columns, vocab_size, process_group)
    check_count("k", k, 1, total_columns)
    if always_include is not None:
        always_include = check_included_ids(always_include, hidden, total_columns)
    module = choose_backend(backend, hidden)
    if hidden.shape[0] == 0:
        columns = k if always_include is None else k + 1
        scores = hidden.new_zeros(0, dtype=accumulation_dtype(hidden))
        ids = hidden.new_zeros((0, columns), dtype=torch.int64)
        return TopkLogprobs(ids=ids, logp=scores.new_zeros((0, columns)), tail_logp=scores, logz=scores, entropy=scores)
    return module.topk_logprobs(hidden.detach(), weight.detach(), k, always_include=always_include, options=options)


def dense_divergence(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    divergence: Divergence,
    *,
    token_weight: Tensor | None = None,
    ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    constants_s: HeadConstants = PLAIN,
    constants_t: HeadConstants = PLAIN,
    vocab_size: int | None = None,
    process_group: Any = None,
    vocab_start: int = 0,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, SelectedLogprobs]:
    """Per-token divergence D [N] between the student's and the teacher's whole distributions, from two heads of any hidden sizes.

    Differentiable in hidden_s, weight_s and the student's bias; the teacher never takes a gradient. Without `token_weight` the
    backward pass projects both heads again (six products). With it [N], the gradients are formed in the forward pass (four): D is the
    same, and the upstream gradient must be proportional to token_weight, as in (token_weight * D).sum(); backward raises otherwise.
    With `ids` [N, K] the result is (D, SelectedLogprobs): what the student has at those ids, as constants, from the same logits.
    Heads with different numbers of rows need `vocab_size`. Log-probabilities below -1e4 count as -1e4.
    """
    shared = {
        "temperature": temperature,
        "vocab_size": vocab_size,
        "process_group": process_group,
        "vocab_start": vocab_start,
        "chunk_bytes": chunk_bytes,
    }
    check_divergence(divergence)
    check_constants("constants_s", constants_s)
    check_constants("constants_t", constants_t)
    student = _head_inputs("_s", hidden_s, weight_s, constants_s, shared)
    teacher = _head_inputs("_t", hidden_t, weight_t, constants_t, shared)
    _check_pair(student, teacher, vocab_size)
    if token_weight is not None:
        token_weight = check_token_tensor("token_weight", token_weight, hidden_s)
    if ids is not None:
        ids = check_ids(ids, hidden_s, _total_columns(student.options.valid_columns, vocab_size, process_group))
    torch_only = "elementwise divergences run on the torch backend" if divergence.name == "elementwise" else None
    module = choose_backend(backend, hidden_s, torch_only=torch_only)
    if hidden_s.shape[0] == 0:
        value = _connected_zero(hidden_s, weight_s, constants_s.bias) + hidden_s.sum(dim=1).to(accumulation_dtype(hidden_s))
        if ids is None:
            return value
        inputs = (hidden_s.detach(), weight_s.detach(), None if constants_s.bias is None else constants_s.bias.detach(), ids)
        return value, _empty_selected(*inputs, tail=True, entropy=True, student_topk=0)
    value, selected = module.dense_divergence(student, teacher, divergence, token_weight=token_weight, ids=ids)
    return value if ids is None else (value, selected)


def _head_inputs(suffix: str, hidden: Tensor, weight: Tensor, constants: HeadConstants, shared: dict[str, Any]) -> HeadInputs:
    check_projection(hidden, weight, suffix=suffix)
    return HeadInputs(hidden=hidden, weight=weight, options=check_options(hidden, weight, constants, suffix=suffix, **shared))


def _check_pair(student: HeadInputs, teacher: HeadInputs, vocab_size: int | None) -> None:
    hidden_s, hidden_t = student.hidden, teacher.hidden
    if hidden_s.shape[0] != hidden_t.shape[0]:
        raise ValueError(f"hidden_s has {hidden_s.shape[0]} tokens and hidden_t {hidden_t.shape[0]}; they must be the same tokens")
    if hidden_s.device != hidden_t.device:
        raise ValueError(f"hidden_s is on {hidden_s.device} and hidden_t on {hidden_t.device}; they must be on one device")
    if accumulation_dtype(hidden_s) != accumulation_dtype(hidden_t):
        raise ValueError(f"hidden_s is {hidden_s.dtype} and hidden_t {hidden_t.dtype}; fp64 needs both in fp64")
    rows_s, rows_t = student.weight.shape[0], teacher.weight.shape[0]
    if vocab_size is None and rows_s != rows_t:
        raise ValueError(f"weight_s has {rows_s} rows and weight_t {rows_t}; pass vocab_size, the number of columns both mean")
    if student.options.valid_columns != teacher.options.valid_columns:
        raise ValueError(f"weight_s has {rows_s} rows and weight_t {rows_t}; both must hold the {vocab_size} valid columns")


def _total_columns(valid_columns: int, vocab_size: int | None, process_group: Any) -> int | None:
    return valid_columns if process_group is None else vocab_size


def _connected_zero(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A zero that reaches every differentiable input, so that a rank without tokens still takes part in the backward pass."""
    dtype = accumulation_dtype(hidden)
    zero = hidden.sum().to(dtype) + weight[:0].sum().to(dtype)
    return zero if bias is None else zero + bias[:0].sum().to(dtype)


def _empty_selected(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *, tail: bool, entropy: bool, student_topk: int
) -> SelectedLogprobs:
    zero = _connected_zero(hidden, weight, bias)
    per_token = zero.expand(0)
    return SelectedLogprobs(
        logp=zero.expand(ids.shape),
        tail_logp=per_token if tail else None,
        logz=per_token,
        entropy=per_token if entropy else None,
        topk_ids=ids.new_zeros((0, student_topk)) if student_topk else None,
        topk_logp=per_token.detach().new_zeros((0, student_topk)) if student_topk else None,
    )
