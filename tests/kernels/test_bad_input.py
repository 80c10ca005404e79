"""Every mistake is a ValueError that names the argument, what it was and what it should be."""

import subprocess
import sys
from pathlib import Path

import opd_kernels
import pytest
import torch
from opd_kernels.backends import choose_backend

HIDDEN, WEIGHT, IDS = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": HIDDEN[0]}, r"hidden has shape \[8\]; it must have two dimensions"),
        ({"hidden": HIDDEN.long()}, "hidden has dtype torch.int64; it must be a floating-point tensor"),
        ({"hidden": [1.0]}, "hidden is a list; it must be a tensor"),
        ({"weight": torch.randn(20, 9)}, r"hidden has shape \[4, 8\] and weight \[20, 9\]"),
        ({"weight": torch.empty(0)}, r"weight has shape \[0\].*looks partitioned: call the operation inside opd_kernels.Head"),
        ({"weight": torch.empty(0, 8)}, r"weight has shape \[0, 8\]; it must have at least one row"),
        ({"weight": WEIGHT.to("meta")}, "hidden is on cpu and weight on meta"),
        ({"weight": WEIGHT.double()}, "fp64 needs both in fp64"),
        ({"ids": IDS.float()}, "ids is torch.float32; it must be an int32 or int64 tensor"),
        ({"ids": IDS[:3]}, r"ids has shape \[3, 3\]; it must be \[4, K\]"),
        ({"ids": IDS[:, :0]}, "with K at least 1"),
        ({"ids": IDS.to("meta")}, "ids is on meta and hidden on cpu"),
        ({"ids": IDS + 20}, r"ids\[0, 0\] is 20; it must be -1 \(a pad\) or an id from 0 to 19"),
        ({"ids": IDS - 2}, r"ids\[0, 0\] is -2"),
        ({"ids": IDS + 18, "vocab_size": 18}, "an id from 0 to 17"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, r"temperature\[2\] is -1.0; it must be a positive number"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \[3\].*must be a number or \[4\]"),
        ({"bias": torch.zeros(19)}, r"bias is \[19\] torch.float32 on cpu; it must be \[20\]"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be a positive number, or None"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"vocab_size": 21}, "vocab_size is 21; it must be a whole number between 1 and weight's 20 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_start": 5}, "vocab_start is 5 without a process_group"),
        ({"vocab_start": -1}, "vocab_start is -1"),
        ({"student_topk": 21}, "student_topk is 21; it must be a whole number between 0 and the vocabulary's 20"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0; it must be a positive whole number of bytes"),
        ({"backend": "cuda"}, "backend is 'cuda'; it must be one of auto, reference, torch, triton"),
        ({"weight": WEIGHT.to_sparse()}, r"weight has layout torch.sparse_coo; .*pass weight.to_dense\(\)"),
        ({"hidden": HIDDEN.to("meta"), "weight": WEIGHT.to("meta"), "ids": IDS.to("meta")}, "hidden is on meta and has no values"),
        ({"ids": IDS.tolist()}, "ids is list; it must be an int32 or int64 tensor"),
        ({"temperature": "1"}, "temperature is '1'; it must be a positive number"),
        ({"temperature": [1.0] * 4}, r"temperature is \[1.0, .*; it must be a positive number, or a tensor \[4\]"),
        ({"temperature": torch.ones(4, requires_grad=True)}, r"temperature requires a gradient; .*pass temperature.detach\(\)"),
        ({"bias": 0.0}, r"bias is a float; it must be a tensor \[20\]"),
        ({"softcap": "30"}, "softcap is '30'"),
        ({"logit_scale": None}, "logit_scale is None"),
        ({"vocab_size": 8.0}, "vocab_size is 8.0; it must be a whole number"),
        ({"vocab_start": None}, "vocab_start is None"),
        ({"student_topk": 2.0}, "student_topk is 2.0; it must be a whole number"),
        ({"student_topk": True}, "student_topk is True; it must be a whole number"),
        ({"chunk_bytes": 1e6}, "chunk_bytes is 1000000.0; it must be a positive whole number of bytes"),
        ({"process_group": "gloo"}, "process_group is 'gloo'; it must be a torch.distributed group"),
        ({"ids": IDS.to_sparse()}, r"ids has layout torch.sparse_coo; .*pass ids.to_dense\(\)"),
        ({"bias": torch.zeros(20).to_sparse()}, r"bias has layout torch.sparse_coo; .*pass bias.to_dense\(\)"),
        ({"hidden": torch.nested.nested_tensor([HIDDEN[0], HIDDEN[1]])}, "hidden has layout nested; it must be dense"),
        ({"temperature": torch.ones(4, dtype=torch.complex64)}, "temperature has dtype torch.complex64"),
        ({"temperature": torch.ones(4, dtype=torch.bool)}, "temperature has dtype torch.bool"),
        ({"tail": "no"}, "tail is 'no'; it must be True or False"),
        ({"entropy": None}, "entropy is None; it must be True or False"),
    ],
)  # fmt: skip
def test_selected_logprobs(arguments, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS, **arguments}
    with pytest.raises(ValueError, match=message):
        opd_kernels.selected_logprobs(**arguments)
    with pytest.raises(ValueError, match=message):
        opd_kernels.fused_sparse_loss(loss_fn=lambda s: (s.logz.sum(), {}), **arguments)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ([IDS], "extras is a list; it must be a tuple of tensors"),
        ((torch.zeros(3),), r"extras\[0\] is \[3\]; it must be a tensor whose first dimension is the 4 tokens"),
        ((torch.zeros(4, requires_grad=True),), r"extras\[0\] requires a gradient, which would be lost"),
        ((torch.zeros(4, device="meta"),), r"extras\[0\] is on meta and hidden on cpu"),
    ],
)
def test_extras(extras, message):
    with pytest.raises(ValueError, match=message):
        opd_kernels.fused_sparse_loss(HIDDEN, WEIGHT, IDS, lambda s, *e: (s.logz.sum(), {}), extras)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (None, r"loss_fn is a NoneType; it must be a function \(selected, \*extras\) -> \(loss, aux\)"),
        (lambda s: s.logz.sum(), r"loss_fn returned a Tensor; it must return the pair \(loss, aux\)"),
        (lambda s: (s.logz.sum(), None), r"loss_fn returned a tuple; it must return the pair \(loss, aux\)"),
        (lambda s: (1.5, {}), "loss_fn returned a loss that is a float; return the sum over the chunk, a scalar tensor"),
        (lambda s: (s.logz.sum() * 1j, {}), "loss_fn returned a loss of dtype torch.complex64; return a floating-point scalar"),
        (lambda s: (s.logz, {}), r"loss_fn returned a loss of shape \[\d\]; return the sum over the chunk"),
        (lambda s: (s.logz.sum(), {"kl": s.logz.sum()}), r"loss_fn's aux\['kl'\] has shape \[\]; return a tensor with one value a token"),
        (lambda s: (s.logz.sum(), {"kl": 1.0}), r"loss_fn's aux\['kl'\] is a float; return a tensor with one value a token"),
    ],
)
def test_loss_fn(loss_fn, message, tokens, backend):
    """A batch without tokens finds the same mistakes."""
    with pytest.raises(ValueError, match=message):
        opd_kernels.fused_sparse_loss(HIDDEN[:tokens], WEIGHT, IDS[:tokens], loss_fn, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda s: (s.logp.detach().sum(), {}),
        lambda s: (torch.tensor(2.0), {}),
        lambda s: (torch.no_grad()(lambda: s.logz.sum())(), {}),
    ],
    ids=["detached", "constant", "no_grad"],
)
def test_a_loss_without_a_gradient(loss_fn, backend):
    """Its gradients would be zeros without a word; with no gradient wanted the value stands."""
    hidden = HIDDEN.clone().requires_grad_()
    with pytest.raises(ValueError, match="does not depend on selected.logp, tail_logp, logz or entropy"):
        opd_kernels.fused_sparse_loss(hidden, WEIGHT, IDS, loss_fn, backend=backend)
    with torch.no_grad():
        value, _ = opd_kernels.fused_sparse_loss(hidden, WEIGHT, IDS, loss_fn, backend=backend)
    assert torch.isfinite(value) and not value.requires_grad


def test_a_loss_of_something_else_alone():
    captured = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on selected"):
        opd_kernels.fused_sparse_loss(HIDDEN.clone().requires_grad_(), WEIGHT, IDS, lambda s: (captured.sum(), {}), backend="torch")


def test_aux_names_that_change_from_chunk_to_chunk():
    calls = []

    def loss_fn(selected):
        calls.append(None)
        return selected.logz.sum(), {f"chunk{len(calls)}": selected.logz}

    with pytest.raises(ValueError, match=r"aux holds \['chunk1'\] for one chunk and \['chunk2'\] for another"):
        opd_kernels.fused_sparse_loss(HIDDEN, WEIGHT, IDS, loss_fn, backend="torch", chunk_bytes=100)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("tokens", [0, 4])
def test_extras_that_loss_fn_does_not_take(count, tokens):
    extras = (torch.zeros(tokens),) * count
    with pytest.raises(ValueError, match=rf"extras has {count} tensors, but loss_fn takes \(s, teacher_logp, weight\)"):
        opd_kernels.fused_sparse_loss(HIDDEN[:tokens], WEIGHT, IDS[:tokens], lambda s, teacher_logp, weight: (s.logz.sum(), {}), extras)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": "3"}, "k is '3'; it must be a whole number"),
        ({"k": 0}, "k is 0; it must be a whole number between 1 and the vocabulary's 20"),
        ({"k": 19, "vocab_size": 18}, "k is 19; it must be a whole number between 1 and the vocabulary's 18"),
        ({"always_include": torch.tensor([0, 1, 2, 20])}, r"always_include\[3\] is 20"),
        ({"always_include": IDS}, r"always_include has shape \[4, 3\]; it must be \[4\]"),
    ],
)
def test_topk_logprobs(arguments, message):
    with pytest.raises(ValueError, match=message):
        opd_kernels.topk_logprobs(HIDDEN, WEIGHT, **{"k": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_t": torch.randn(5, 8)}, "hidden_s has 4 tokens and hidden_t 5"),
        ({"weight_t": torch.randn(21, 8)}, "pass vocab_size"),
        ({"weight_t": torch.randn(19, 8), "vocab_size": 20}, "vocab_size is 20; it must be a whole number between 1 and weight_t's 19 rows"),
        ({"hidden_t": HIDDEN.double(), "weight_t": WEIGHT.double()}, "fp64 needs both in fp64"),
        ({"token_weight": torch.ones(3)}, r"token_weight is \[3\] on cpu; it must be \[4\]"),
        ({"token_weight": torch.ones(4, requires_grad=True)}, "token_weight requires a gradient"),
        ({"constants_t": opd_kernels.HeadConstants(softcap=-1.0)}, "softcap_t is -1.0"),
        ({"constants_s": {"softcap": 1.0}}, "constants_s is a dict; it must be an opd_kernels.HeadConstants"),
        ({"ids": IDS[:3]}, r"ids has shape \[3, 3\]; it must be \[4, K\]"),
        ({"ids": IDS + 20}, r"ids\[0, 0\] is 20; it must be -1"),
        ({"token_weight": 1.0}, r"token_weight is a float; it must be a tensor \[4\]"),
        ({"divergence": opd_kernels.Divergence(name="tvd")}, "divergence has the name 'tvd'; it must be one of forward_kl, reverse_kl, jsd"),
        ({"divergence": opd_kernels.Divergence(name="jsd", mix=1.0)}, "mix is 1.0"),
        ({"divergence": "forward_kl"}, r"divergence is 'forward_kl'; build it with a call such as opd_kernels.forward_kl\(\)"),
    ],
)
def test_dense_divergence(arguments, message):
    arguments = {"hidden_s": HIDDEN, "weight_s": WEIGHT, "hidden_t": HIDDEN, "weight_t": WEIGHT, "divergence": opd_kernels.jsd(), **arguments}
    with pytest.raises(ValueError, match=message):
        opd_kernels.dense_divergence(**arguments)


@pytest.mark.parametrize("layer", [None, torch.nn.Embedding(4, 4), torch.nn.Bilinear(2, 2, 2)])
def test_head_stands_in_for_a_linear_layer_only(layer):
    with pytest.raises(ValueError, match=f"lm_head is a {type(layer).__name__}.* it must be a linear layer"):
        opd_kernels.Head.from_lm_head(layer)


def test_a_request_is_a_function():
    head = opd_kernels.Head.from_lm_head(torch.nn.Linear(8, 20))
    with pytest.raises(ValueError, match="request is a str; it must be a function"):
        head(HIDDEN, "logits")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: opd_kernels.jsd(0.0), "mix is 0.0; it must lie strictly between 0 and 1"),
        (lambda: opd_kernels.skew_forward_kl(1.0), "alpha is 1.0; it must be at least 0 and below 1"),
        (lambda: opd_kernels.forward_kl(entry_clip=-0.1), "entry_clip is -0.1"),
        (lambda: opd_kernels.forward_kl(entry_clip="a"), "entry_clip is 'a'"),
        (lambda: opd_kernels.forward_kl(entry_clip=True), "entry_clip is True"),
        (lambda: opd_kernels.jsd("a"), "mix is 'a'"),
        (lambda: opd_kernels.divergences.elementwise("a", torch.add), "value is 'a'; it must be a function"),
        (lambda: opd_kernels.divergences.elementwise(torch.add, None), "slope is None; it must be a function"),
        (lambda: opd_kernels.skew_reverse_kl("a"), "alpha is 'a'"),
    ],
)
def test_divergences(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend is 'triton', but the tensors are on cpu .*; use backend='auto' or 'torch'"):
        choose_backend("triton", HIDDEN)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="fp64 needs the torch or reference backend"):
        choose_backend("triton", HIDDEN.double())
    with pytest.raises(ValueError, match="elementwise divergences run on the torch backend"):
        choose_backend("triton", HIDDEN, torch_only="elementwise divergences run on the torch backend")


def test_auto_takes_torch_on_the_cpu_and_says_why_once(caplog):
    from opd_kernels import backends

    backends._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="opd_kernels"):
        names = {choose_backend("auto", HIDDEN).__name__ for _ in range(3)}
    assert names == {"opd_kernels.chunked"}
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("opd_kernels backend torch: ")


def test_works_without_triton_and_without_the_rest_of_the_project():
    """In a fresh process where `import triton` fails."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, opd_kernels\n"
        "from opd_kernels import backends\n"
        "backends._triton_installed = lambda: False\n"
        "out = opd_kernels.selected_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(1, 1, dtype=torch.int64))\n"
        "print(round(out.logp.exp().item(), 6), [name for name in sys.modules if name.split('.')[0] in ('opd', 'opd_rollout')])\n"
    )
    environment = {"PYTHONPATH": str(Path(opd_kernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, env=environment)
    assert run.stdout == "0.25 []\n", run.stderr
