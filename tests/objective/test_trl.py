"""The same tensors through TRL 1.16's own loss code: equal, or different by what the test states."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

from opd.objective import Setting, build_objective
from tests.objective.dense import Batch, load, log

pytestmark = pytest.mark.slow  # importing TRL's trainers takes longer than five seconds


@pytest.fixture
def batch():
    return Batch.make()


def padded(values, fill=0.0):
    """[B, T, ...] of tensors [T_i, ...]."""
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


class FakeTrainer(SimpleNamespace):
    """What GRPOTrainer._compute_loss reads of its trainer, one process, one micro-batch; log-probs come from the batch's logits."""

    def __init__(self, batch, logits, **options):
        defaults = {
            "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token", "beta": 0.0,
            "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False, "vllm_importance_sampling_correction": False,
            "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1, "max_completion_length": 8,
            "model": SimpleNamespace(training=True), "_metrics": defaultdict(lambda: defaultdict(list)),
            "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            "accelerator": SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x, sync_gradients=True
            ),
        }  # fmt: skip
        super().__init__(**{**defaults, **options, "batch": batch, "logits": logits})

    def _get_per_token_logps_and_entropies(self, *_, **__):
        own = [log(z).gather(-1, a.tokens[:, None])[:, 0] for a, z in zip(self.batch.answers, self.logits, strict=True)]
        return padded(own), padded([-(log(z).exp() * log(z)).sum(-1) for z in self.logits]), None

    def get_high_entropy_mask(self, *arguments):
        return GRPOTrainer.get_high_entropy_mask(self, *arguments)


def theirs(batch, advantages, **options):
    """(loss, gradients) of GRPOTrainer._compute_loss."""
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    trainer = FakeTrainer(batch, logits, **options)
    mask = padded([torch.ones(len(a.tokens)) for a in batch.answers])
    inputs = {
        "prompt_ids": torch.zeros(len(logits), 1).long(), "prompt_mask": torch.ones(len(logits), 1), "completion_mask": mask,
        "completion_ids": padded([a.tokens for a in batch.answers], 0), "advantages": advantages,
        "old_per_token_logps": padded([a.at(a.old) for a in batch.answers]), "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": padded([a.at(a.teachers["reference"]) for a in batch.answers]),
    }  # fmt: skip
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = padded([(a.at(a.old) - a.at(a.engine)).exp().clamp(max=2.0) for a in batch.answers])
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), [z.grad for z in logits]


def standardised(batch, eps=1e-6):
    groups = [torch.tensor([b.reward for b in batch.answers if b.group == a.group]).double() for a in batch.answers]
    return torch.stack([(a.reward - r.mean()) / (r.std() + eps) for a, r in zip(batch.answers, groups, strict=True)])


def equal(ours, other, value=True, atol=1e-7):
    if value:
        torch.testing.assert_close(ours[0], other[0], rtol=0, atol=atol)
    for one, two in zip(ours[1], other[1], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


def grpo_like(**changes):
    spec = {"policy": "ppo_clip", "advantage": {"group_centered": {"std": True}}, **changes}
    return build_objective([spec], Setting(signals=("reference",), group=4, source="student"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("grpo_kl", {"beta": 0.04}),
        ("gspo", {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
        ("tis", {"loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True, "vllm_importance_sampling_correction": True}),
    ],
)
def test_recipes_equal_trl_in_value_and_gradient(batch, name, options):
    equal(batch.run(load(name)[1]), theirs(batch, standardised(batch), **options))


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (grpo_like(policy={"ppo_clip": {"high": 0.28}}), {"loss_type": "dapo", "epsilon_high": 0.28}),
        (grpo_like(), {"loss_type": "bnpo"}),  # of one micro-batch: there the mean is per micro-batch, here over the optimiser step
        (grpo_like(reduce={"constant": {"length": 8}}), {"loss_type": "dr_grpo"}),
    ],
)
def test_denominators_equal_trl(batch, objective, options):
    equal(batch.run(objective), theirs(batch, standardised(batch), **options))


def test_cispo_has_trls_gradient_and_another_value(batch):
    """TRL's value is -w A log p, which means nothing; here it is -w A. Its epsilon_high is the absolute cap: 5 is `high: 4`."""
    ours, other = batch.run(load("cispo")[1]), theirs(batch, standardised(batch), loss_type="cispo", epsilon_high=5.0)
    equal(ours, other, value=False)
    assert abs(float(ours[0] - other[0])) > 1e-2


def test_trls_default_cap_of_cispo_scales_every_gradient(batch):
    """epsilon_high left at epsilon = 0.2 is a cap of 0.2 on the ratio: the peer's trap, and why `high` counts from one here."""
    capped, whole = theirs(batch, standardised(batch), loss_type="cispo"), theirs(batch, standardised(batch), loss_type="cispo", epsilon_high=5.0)
    sizes = [float(sum(g.square().sum() for g in found[1]).sqrt()) for found in (capped, whole)]
    assert sizes[0] < 0.3 * sizes[1]


def test_the_top_entropy_mask_stays_in_trls_denominator(batch):
    """There the unselected tokens count in the mean; here they leave it. With one share the two differ by that factor alone."""
    objective = grpo_like(weight={"top_entropy": {"share": 0.5}})
    fresh = Batch([a for a in batch.answers])
    for a in fresh.answers:
        a.old = a.now  # TRL takes the entropy of the weights as they are now
    ours = fresh.run(objective)
    other = theirs(fresh, standardised(fresh), loss_type="dapo", top_entropy_quantile=0.5)
    kept = sum(float(fields["keep/policy"].sum()) for fields in (s.fields for s in ours[2]))
    every = sum(len(a.tokens) for a in fresh.answers)
    equal((ours[0] * kept / every, [g * kept / every for g in ours[1]]), other)


@pytest.mark.parametrize(("beta", "loss"), [(0.5, {"jsd": {"mix": 0.5}}), (0.1, {"jsd": {"mix": 0.1}}), (0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_gkds_divergence_is_trls(batch, beta, loss):
    objective = build_objective([{"distill": loss}], Setting(signals=("main",)))
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    labels = padded([torch.zeros(len(z)).long() for z in logits], -100)
    found = GKDTrainer.generalized_jsd_loss(padded(logits), padded([a.teachers["main"] for a in batch.answers]), labels=labels, beta=beta)
    found.backward()
    equal(batch.run(objective), (found.detach(), [z.grad for z in logits]), atol=1e-10)


def test_iw_opd_is_trls(batch):
    """Advantages from the same rollout log-probs; TRL's value is -A log p, the gradient the same."""
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    trainer = SimpleNamespace(
        temperature=1.0, iw_opd_epsilon=1e-8, iw_opd_gamma=0.5, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    answers = batch.answers
    labels = padded([torch.zeros(len(z)).long() for z in logits], -100)
    loss = IWOPDTrainer._compute_iw_opd_loss(
        trainer, padded(logits), padded([a.tokens for a in answers]), labels,
        padded([a.at(a.teachers["main"]) for a in answers]), padded([a.at(a.old) for a in answers]),
    )  # fmt: skip
    loss.backward()
    equal(batch.run(load("iw_opd")[1]), (loss.detach(), [z.grad for z in logits]), value=False)


def test_sdpos_tail_bucket_is_trls(batch):
    """Student's top-k with a bucket for the rest, JSD; the same ids on both sides."""
    objective = build_objective([{"distill": {"jsd": {"mix": 0.5}}, "support": {"student_topk": {"k": 3}}}], Setting(signals=("main",)))
    logits = [a.now.clone().requires_grad_() for a in batch.answers]
    total = 0.0
    for a, z in zip(batch.answers, logits, strict=True):
        a.old = a.now  # there the support is chosen anew at every update
        options = {"distillation_topk": 3, "distillation_alpha": 0.5, "distillation_add_tail": True}
        total = total + compute_topk_self_distillation_loss(z, a.teachers["main"], **options).sum()
    total = total / sum(len(a.tokens) for a in batch.answers)
    total.backward()
    equal(batch.run(objective), (total.detach(), [z.grad for z in logits]))
