"""What is measured: the same task by plain PyTorch, by other libraries where they are installed, and by opd_kernels."""

import functools
import importlib

import opd_kernels
import torch
import torch.nn.functional as F
from harness import Inputs, System, Task
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# --- sparse forward KL with tail: sum over K ids and the bucket of all others ---------------------------------------------


def sparse_forward_kl(logp: Tensor, tail_logp: Tensor, teacher_logp: Tensor, teacher_tail: Tensor) -> Tensor:
    """[N] KL(teacher || student) on K ids and one bucket for the rest."""
    kept = (teacher_logp.exp() * (teacher_logp - logp)).sum(dim=1)
    return kept + teacher_tail.exp() * (teacher_tail - tail_logp)


def tail_of(logp: Tensor) -> Tensor:
    """log(1 - sum p) from the log-probabilities themselves, as plain code does it."""
    return torch.log(-torch.expm1(logp.logsumexp(dim=1).clamp(max=-1e-7)))


def eager(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).to(_wide(inputs))
    logp = logits.log_softmax(dim=1).gather(1, inputs.ids)
    return sparse_forward_kl(logp, tail_of(logp), inputs.teacher_logp, inputs.teacher_tail).mean()


def eager_fp32_logits(inputs: Inputs) -> Tensor:
    logits = inputs.hidden.to(_wide(inputs)) @ inputs.weight.to(_wide(inputs)).T
    logp = logits.log_softmax(dim=1).gather(1, inputs.ids)
    return sparse_forward_kl(logp, tail_of(logp), inputs.teacher_logp, inputs.teacher_tail).mean()


def eager_logsumexp(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).to(_wide(inputs))
    logp = logits.gather(1, inputs.ids) - logits.logsumexp(dim=1, keepdim=True)
    return sparse_forward_kl(logp, tail_of(logp), inputs.teacher_logp, inputs.teacher_tail).mean()


def _wide(inputs: Inputs) -> torch.dtype:
    return torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32


def _chunk_loss(hidden: Tensor, weight: Tensor, ids: Tensor, teacher_logp: Tensor, teacher_tail: Tensor) -> Tensor:
    logp = (hidden @ weight.T).float().log_softmax(dim=1).gather(1, ids)
    return sparse_forward_kl(logp, tail_of(logp), teacher_logp, teacher_tail).sum()


@functools.cache
def _compiled_chunk_loss() -> System:
    return torch.compile(_chunk_loss, dynamic=False)


def compiled_chunks(inputs: Inputs, rows: int = 1024) -> Tensor:
    """torch.compile on 1024 tokens at a time, recomputed in backward."""
    total = torch.zeros((), device=inputs.hidden.device)
    for start in range(0, inputs.hidden.shape[0], rows):
        part = slice(start, start + rows)
        arguments = (inputs.hidden[part], inputs.weight, inputs.ids[part], inputs.teacher_logp[part], inputs.teacher_tail[part])
        total = total + checkpoint(_compiled_chunk_loss(), *arguments, use_reentrant=False)
    return total / inputs.hidden.shape[0]


def composable(inputs: Inputs, **keywords: object) -> Tensor:
    out = opd_kernels.selected_logprobs(inputs.hidden, inputs.weight, inputs.ids, entropy=False, **keywords)
    return sparse_forward_kl(out.logp, out.tail_logp, inputs.teacher_logp, inputs.teacher_tail).mean()


def fused(inputs: Inputs, **keywords: object) -> Tensor:
    def loss_fn(selected, teacher_logp, teacher_tail):
        return sparse_forward_kl(selected.logp, selected.tail_logp, teacher_logp, teacher_tail).sum() / inputs.hidden.shape[0], {}

    extras = (inputs.teacher_logp, inputs.teacher_tail)
    return opd_kernels.fused_sparse_loss(inputs.hidden, inputs.weight, inputs.ids, loss_fn, extras, entropy=False, **keywords)[0]


def sparse_oracle(inputs: Inputs) -> Tensor:
    return composable(inputs, backend="reference")


def sparse_task(*, gpu: bool) -> Task:
    systems = {"eager": eager, "eager_logsumexp": eager_logsumexp, "composable": composable, "fused": fused,
               "three_products_alone": functools.partial(products_alone, products=3),
               "four_products_alone": functools.partial(products_alone, products=4)}  # fmt: skip
    if gpu:
        systems = {"eager": eager, "eager_fp32_logits": eager_fp32_logits, "eager_logsumexp": eager_logsumexp,
                   "torch_compile_chunks": compiled_chunks, "composable": composable, "fused": fused,
                   "composable_torch": functools.partial(composable, backend="torch"),
                   "fused_torch": functools.partial(fused, backend="torch")}  # fmt: skip
    return Task(name="sparse forward KL with tail", systems=systems, oracle=sparse_oracle, baseline="eager")


# --- one label a token: what cross-entropy kernels do --------------------------------------------------------------------


def labels_of(inputs: Inputs) -> Tensor:
    """[N] in memory of its own: TRL's Triton kernels take no notice of strides."""
    return inputs.ids[:, 0].contiguous()


def label_eager(inputs: Inputs) -> Tensor:
    return F.cross_entropy((inputs.hidden @ inputs.weight.T).to(_wide(inputs)), labels_of(inputs))


def label_torch(inputs: Inputs) -> Tensor:
    return F.linear_cross_entropy(inputs.hidden, inputs.weight, labels_of(inputs))


def label_torch_chunked(inputs: Inputs) -> Tensor:
    options = importlib.import_module("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions()
    return F.linear_cross_entropy(inputs.hidden, inputs.weight, labels_of(inputs), options=options)


def label_liger(inputs: Inputs) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    result = functional.liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, labels_of(inputs))
    return result[0] if isinstance(result, tuple) else result


def label_cce(inputs: Inputs, implementation: str = "cce") -> Tensor:
    package = importlib.import_module("cut_cross_entropy")
    return package.linear_cross_entropy(inputs.hidden, inputs.weight, labels_of(inputs), impl=implementation)


def label_trl(inputs: Inputs) -> Tensor:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return -function.apply(inputs.hidden, inputs.weight, None, labels_of(inputs), 1.0, 32_768, None, 1.0, ())[0].mean()


def label_composable(inputs: Inputs, **keywords: object) -> Tensor:
    ids = inputs.ids[:, :1].contiguous()
    return -opd_kernels.selected_logprobs(inputs.hidden, inputs.weight, ids, tail=False, entropy=False, **keywords).logp.mean()


def label_fused(inputs: Inputs) -> Tensor:
    ids, tokens = inputs.ids[:, :1].contiguous(), inputs.hidden.shape[0]
    return opd_kernels.fused_sparse_loss(inputs.hidden, inputs.weight, ids, lambda s: (-s.logp.sum() / tokens, {}), tail=False, entropy=False)[0]


def label_task(*, gpu: bool) -> Task:
    systems = {"eager": label_eager, "linear_cross_entropy": label_torch, "linear_cross_entropy_chunked": label_torch_chunked,
               "trl_chunked_logprob": label_trl, "composable": label_composable, "fused": label_fused}  # fmt: skip
    if gpu:
        systems |= {"liger_fused_linear_ce": label_liger, "cce": label_cce}
        systems |= {name: functools.partial(label_cce, implementation=name) for name in ("cce_kahan_full_c", "cce_exact")}
    oracle = functools.partial(label_composable, backend="reference")
    return Task(name="one label a token", systems=systems, oracle=oracle, baseline="eager")


# --- dense JSD between two heads ------------------------------------------------------------------------------------------


def dense_eager(inputs: Inputs) -> Tensor:
    lp = (inputs.hidden @ inputs.weight.T).to(_wide(inputs)).log_softmax(dim=1)
    lq = (inputs.hidden_t @ inputs.weight_t.T).to(_wide(inputs)).log_softmax(dim=1)
    lm = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0))
    kl = functools.partial(F.kl_div, reduction="none", log_target=True)
    return 0.5 * (kl(lm, lq) + kl(lm, lp)).sum(dim=1).mean()


def dense_ours(inputs: Inputs, *, hinted: bool, **keywords: object) -> Tensor:
    tokens = inputs.hidden.shape[0]
    hint = torch.full((tokens,), 1.0 / tokens, device=inputs.hidden.device) if hinted else None
    values = opd_kernels.dense_divergence(
        inputs.hidden, inputs.weight, inputs.hidden_t, inputs.weight_t, opd_kernels.jsd(0.5), token_weight=hint, **keywords
    )
    return values.mean()


def dense_trl(inputs: Inputs) -> Tensor:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return function.apply(inputs.hidden, inputs.weight, None, inputs.hidden_t, inputs.weight_t, None, 0.5)[0].mean()


def dense_liger_chunked(inputs: Inputs, *, compiled: bool) -> Tensor:
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled
    )
    return loss(inputs.hidden, inputs.weight, inputs.hidden_t, inputs.weight_t, labels_of(inputs))


def dense_liger_triton(inputs: Inputs) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=0.5)
    return module(inputs.hidden, inputs.weight, inputs.hidden_t, inputs.weight_t, None)


def dense_task(*, gpu: bool) -> Task:
    systems = {
        "eager": dense_eager,
        "trl_chunked_divergence": dense_trl,
        "liger_chunked_jsd": functools.partial(dense_liger_chunked, compiled=gpu),
        "ours_recompute": functools.partial(dense_ours, hinted=False),
        "ours_in_forward": functools.partial(dense_ours, hinted=True),
    }
    if gpu:
        systems["liger_fused_linear_jsd"] = dense_liger_triton
    oracle = functools.partial(dense_ours, hinted=False, backend="reference")
    return Task(name="dense JSD between two heads", systems=systems, oracle=oracle, baseline="liger_fused_linear_jsd" if gpu else "eager")


def products_alone(inputs: Inputs, products: int, width: int = 1024) -> Tensor:
    """What no implementation can do without, one tile of `width` columns at a time: logits (once, or twice with four products) and gradients."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    tokens, columns = hidden.shape[0], weight.shape[0]
    d_hidden, d_weight, tile = torch.zeros_like(hidden), torch.empty_like(weight), hidden.new_empty(tokens * width)
    for again in range(products - 2):
        for start in range(0, columns, width):
            part = weight[start : start + width]
            logits = tile[: tokens * part.shape[0]].view(tokens, -1)
            torch.mm(hidden, part.T, out=logits)
            if again == products - 3:
                d_hidden.addmm_(logits, part)
                torch.mm(logits.T, hidden, out=d_weight[start : start + width])
    return d_hidden[0, 0] + d_weight[0, 0]


# --- scoring: top-k with tail, no gradient --------------------------------------------------------------------------------


def product_alone(inputs: Inputs, rows: int = 1024) -> Tensor:
    """The matrix product that scoring cannot do without, in chunks over one buffer, fp32 result."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    out = torch.empty(min(rows, hidden.shape[0]), weight.shape[0], device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        if part.dtype == torch.float32:
            torch.mm(part, weight.T, out=out[: part.shape[0]])
        else:
            torch.mm(part, weight.T, out_dtype=torch.float32, out=out[: part.shape[0]])
    return out[0, 0]


def scoring_eager(inputs: Inputs) -> Tensor:
    with torch.no_grad():
        logp = (inputs.hidden @ inputs.weight.T).float().log_softmax(dim=1)
        top = logp.topk(inputs.ids.shape[1], dim=1)
        return top.values.sum() + tail_of(top.values).sum() - (logp.exp() * logp).sum()


def scoring_ours(inputs: Inputs, **keywords: object) -> Tensor:
    scores = opd_kernels.topk_logprobs(inputs.hidden, inputs.weight, inputs.ids.shape[1], always_include=labels_of(inputs), **keywords)
    return scores.logp[0, 0]


def scoring_task() -> Task:
    systems = {"product_alone": product_alone, "eager": scoring_eager, "topk_logprobs": scoring_ours}
    return Task(name="top-k scoring with tail and entropy", systems=systems, oracle=None, baseline="product_alone")
