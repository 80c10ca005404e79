"""Denominators, weights, routes and terms put together: hand numbers, and laws that hold for any objective."""

from dataclasses import replace

import pytest
import torch
from opd_kernels import fused_sparse_loss, selected_logprobs

from opd.objective import EVERY_TOKEN, denominators, meters, rows_to_tensors, token_loss
from opd.types import TokenRows

SEQUENCE = torch.tensor([0, 0, 0, 1, 2, 2])
POSITION = torch.tensor([0, 1, 2, 0, 0, 1])
VOCABULARY = 8

MANY_TERMS = [
    {"policy": {"ppo_clip": {"low": 0.2, "high": 0.28}}, "advantage": "group_centered", "coef": 0.7, "reduce": {"constant": {"length": 4}}},
    {
        "distill": {"jsd": {"mix": 0.3}},
        "support": {"student_topk": {"k": 3}},
        "weight": ["staleness_ratio", {"skip_first": {"tokens": 1}}],
        "reduce": "sequence_mean",
    },
    {"distill": "reverse_kl", "support": "sampled", "signal": "other", "name": "anchor", "coef": 0.2},
    {"distill": "forward_kl", "support": "full", "signal": "other", "name": "dense", "weight": "teacher_confidence"},
    {"nll": {}, "reduce": {"token_mean": {"over": "all"}}},
]
NAMES = ("policy", "distill", "anchor", "dense", "nll")


def close(first, second, tolerance=1e-12):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.fixture
def crowd(small):
    """(student logits [6, 8], rows of three answers with two signals, views, masks, routes and advantages that differ)."""
    generator = torch.Generator().manual_seed(7)
    student, main, other = (torch.randn(6, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(3))
    token = torch.tensor([1, 7, 0, 3, 3, 6])
    rows = small.rows(
        token,
        {"main": (main, small.top_ids(student, 3, token)), "other": (other, token[:, None][:, :0])},
        terms=NAMES,
        sequence=SEQUENCE,
        position=POSITION,
        loss_mask=torch.tensor([True, True, True, True, False, True]),
        old_logp=student.log_softmax(-1).gather(-1, token[:, None])[:, 0] + torch.tensor([0.0, 0.5, -0.5, 0.1, 0.0, -0.1], dtype=torch.float64),
    )
    absent = torch.tensor([True, True, True, False, True, True])
    route = {**rows.route, "policy": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 0.5])}
    advantage = {**rows.advantage, "policy": torch.tensor([1.0, 1.0, 1.0, 0.3, -2.0, -2.0])}
    fields = {f"length/{name}": torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0]) for name in NAMES}
    fields["length/distill"] = torch.tensor([2.0, 2.0, 2.0, 0.0, 1.0, 1.0])
    signals = {**rows.signals, "main": replace(rows.signals["main"], available=absent)}
    return student, replace(rows, route=route, advantage=advantage, fields=fields, signals=signals)


def subset(rows: TokenRows, keep: torch.Tensor) -> TokenRows:
    """The rows at an index, hidden states included."""
    tensors, rebuild = rows_to_tensors(rows)
    chosen = rebuild(tuple(tensor[keep] for tensor in tensors))
    return replace(chosen, signals={name: replace(s, hidden=rows.signals[name].hidden[keep]) for name, s in chosen.signals.items()})


def test_denominators_by_hand(small, crowd):
    _, rows = crowd
    found = denominators(small.build(*MANY_TERMS), [small.batch(rows)], lambda counts: counts)
    # Loss tokens: 3 + 1 + 1. policy: answers 0 and 2 are routed, x length 4. distill: answer 1 has no view, first tokens are skipped.
    expected = {"policy": 8.0, "distill": 2.0, "anchor": 5.0, "dense": 5.0, "nll": 5.0, EVERY_TOKEN: 5.0}
    assert found == pytest.approx(expected, abs=1e-12)


def test_denominators_add_over_micro_batches_and_ranks(small, crowd):
    _, rows = crowd
    objective = small.build(*MANY_TERMS)
    parts = [small.batch(subset(rows, SEQUENCE == s)) for s in range(3)]
    whole = denominators(objective, [small.batch(rows)], lambda counts: counts)
    assert denominators(objective, parts, lambda counts: counts) == pytest.approx(whole)
    vectors = []
    for part in parts:
        denominators(objective, [part], lambda counts: vectors.append(counts) or counts)
    assert denominators(objective, parts[:1], lambda counts: sum(vectors)) == pytest.approx(whole)
    assert set(denominators(objective, [], lambda counts: counts).values()) == {1.0, 4.0}


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("token_mean", (1 + 2 + 4 + 8) / 4),
        ("sequence_mean", ((1 + 2 + 4) / 3 + 8) / 2),
        ({"constant": {"length": 10}}, (1 + 2 + 4 + 8) / 20),
        ({"token_mean": {"over": "all"}}, (1 + 2 + 4 + 8) / 5),
        ({"sequence_mean": {"over": "all"}}, ((1 + 2 + 4) / 3 + 8) / 3),
    ],
)
def test_reductions_by_hand(small, reduce, expected):
    """Answers of 3, 1 and 1 tokens, the last one routed away, losses -log p = 1, 2, 4, 8, 16."""
    p = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64).neg().exp()
    student = torch.stack([p, 1 - p], dim=-1).log()
    rows = small.rows(
        torch.zeros(5).long(), {}, terms=("nll",), sequence=torch.tensor([0, 0, 0, 1, 2]), route={"nll": torch.tensor([1.0, 1, 1, 1, 0])}
    )
    assert small.run(small.build({"nll": {}, "reduce": reduce}), student, rows).loss.item() == pytest.approx(expected, abs=1e-12)


def test_sum_of_terms_is_the_total(small, crowd):
    student, rows = crowd
    whole = small.run(small.build(*MANY_TERMS), student, rows)
    parts = [small.run(small.build({"name": name, **spec}), student, rows) for name, spec in zip(NAMES, MANY_TERMS, strict=True)]
    close(whole.loss, sum(part.loss for part in parts))
    close(whole.gradient, sum(part.gradient for part in parts))
    close(whole.columns["loss/total"], sum(whole.columns[f"loss/{name}"] for name in NAMES))
    close(whole.columns["loss/total"].sum(), whole.loss)
    assert all(whole.columns[f"loss/{name}"].abs().sum() > 0 for name in NAMES)


def test_splitting_into_micro_batches_changes_nothing(small, crowd):
    student, rows = crowd
    objective = small.build(*MANY_TERMS)
    whole = small.run(objective, student, rows)
    for split in ([SEQUENCE == 0, SEQUENCE > 0], [SEQUENCE == s for s in (2, 1, 0)]):
        parts = [small.run(objective, student[keep], subset(rows, keep), whole.divisors) for keep in split]
        close(whole.loss, sum(part.loss for part in parts))
        for keep, part in zip(split, parts, strict=True):
            close(whole.gradient[keep], part.gradient)


def test_masked_tokens_are_as_if_absent(small, crowd):
    student, rows = crowd
    objective = small.build(*MANY_TERMS)
    whole = small.run(objective, student, rows)
    kept = rows.loss_mask
    alone = small.run(objective, student[kept], subset(rows, kept))
    close(whole.loss, alone.loss)
    close(whole.gradient[kept], alone.gradient)
    assert whole.gradient[~kept].abs().max() == 0.0


def test_what_is_not_a_number_on_silent_tokens_stays_there(small, crowd):
    student, rows = crowd
    objective = small.build(*(MANY_TERMS[i] for i in (0, 1, 2, 4))).at(0, {})
    clean = small.run(objective, student, rows)
    silent = ~rows.loss_mask
    broken = replace(
        rows,
        advantage={name: torch.where(silent, torch.nan, value) for name, value in rows.advantage.items()},
        old_logp=torch.where(silent, torch.nan, rows.old_logp),
    )
    found = small.run(objective, student, broken)
    close(found.loss, clean.loss, 0)
    close(found.gradient, clean.gradient, 0)


def test_a_routed_away_answer_is_as_if_absent(small, crowd):
    student, rows = crowd
    objective = small.build({"distill": "jsd", "support": {"student_topk": {"k": 3}}})
    away = replace(rows, route={"distill": (SEQUENCE != 2).double()})
    whole, alone = small.run(objective, student, away), small.run(objective, student[:4], subset(rows, SEQUENCE != 2))
    close(whole.loss, alone.loss)
    close(whole.gradient[:4], alone.gradient)


@pytest.mark.parametrize(
    "spec",
    [
        {"distill": "forward_kl", "support": "full"},
        {"distill": {"jsd": {"mix": 0.3}}, "support": "full"},
        {"distill": "reverse_kl", "support": "sampled"},
        *(
            {"distill": name, "support": {side: {"k": 3}}}
            for name in ("forward_kl", "reverse_kl", "jsd")
            for side in ("student_topk", "teacher_topk")
        ),
        {"distill": "forward_kl", "support": {"teacher_topk": {"k": 3, "tail": "renormalise"}}},
        {"distill": "stop_gradient_reverse_kl", "support": {"student_topk": {"k": 3, "tail": "drop"}}},
        {"distill": "jsd", "support": {"student_topk": {"k": 3}}, "target": {"geometric": {"share": 0.4}}},
        {"reference_kl": "k2", "signal": "main", "name": "distill"},
    ],
)
def test_a_teacher_that_equals_the_student_teaches_nothing(small, spec):
    student = torch.randn(3, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    token = torch.tensor([0, 4, 7])
    found = small.run(small.build(spec), student, small.rows(token, {"main": (student, small.top_ids(student, 3, token))}, terms=("distill",)))
    assert found.loss.abs().item() < 1e-15 and found.gradient.abs().max().item() < 1e-15


def test_single_precision_agreement_is_below_a_millionth(small):
    student = 4 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(3))
    token = torch.tensor([0, 4, 7])
    for support in ("full", {"student_topk": {"k": 3}}):
        rows = small.rows(token, {"main": (student, small.top_ids(student, 3, token))}, terms=("distill",))
        found = small.run(small.build({"distill": "reverse_kl", "support": support}), student, rows)
        assert found.loss.dtype == torch.float32 and found.loss.abs().item() < 1e-6 and found.gradient.abs().max().item() < 1e-6


def test_weights_routes_and_coefficients_scale_without_a_gradient(small, crowd):
    student, rows = crowd
    plain = small.run(small.build({"nll": {}}), student, rows)
    halved = small.run(small.build({"nll": {}, "coef": 0.5}), student, rows)
    routed = small.run(small.build({"nll": {}}), student, replace(rows, route={"nll": torch.full((6,), 0.5, dtype=torch.float64)}))
    close(halved.gradient, plain.gradient / 2)
    close(routed.gradient, plain.gradient / 2)
    weighted = small.run(small.build({"nll": {}, "weight": {"staleness_ratio": {"cap": 1.2}}}), student, rows)
    shift = torch.tensor([0.0, 0.5, -0.5, 0.1, 0.0, -0.1], dtype=torch.float64)
    close(weighted.gradient, plain.gradient * (-shift).exp().clamp_max(1.2)[:, None])


def test_staleness_is_one_without_old_log_probs(small, crowd):
    student, rows = crowd
    fresh = replace(rows, old_logp=None)
    spec = {"distill": "jsd", "support": {"student_topk": {"k": 3}}}
    close(
        small.run(small.build({**spec, "weight": "staleness_ratio"}), student, fresh).gradient,
        small.run(small.build(spec), student, fresh).gradient,
        0,
    )


def test_a_fused_pass_in_chunks_equals_the_composed_one(small, crowd):
    student, rows = crowd
    objective = small.build(*(MANY_TERMS[i] for i in (0, 1, 2, 4))).at(0, {})
    composed = small.run(objective, student, rows)
    tensors, rebuild = rows_to_tensors(rows)

    def loss_fn(selected, *extras):
        return token_loss(objective, composed.divisors, selected, rebuild(extras), {})

    logits = student.clone().requires_grad_()
    weight = torch.eye(VOCABULARY, dtype=torch.float64)
    loss, columns = fused_sparse_loss(logits, weight, rows.ids, loss_fn, tensors, chunk_bytes=1, backend="torch")
    loss.backward()
    close(loss.detach(), composed.loss)
    close(logits.grad, composed.gradient)
    for name, column in composed.columns.items():
        torch.testing.assert_close(columns[name], column, rtol=0, atol=1e-12, equal_nan=True)


def test_rows_survive_the_trip_through_tensors(crowd):
    _, rows = crowd
    tensors, rebuild = rows_to_tensors(rows)
    again = rebuild(tensors)
    assert all(tensor.shape[0] == 6 for tensor in tensors)
    assert torch.equal(again.ids, rows.ids) and again.signals["main"].columns == slice(1, 5)
    assert torch.equal(again.signals["other"].tail_logp, rows.signals["other"].tail_logp)
    assert rebuild(tuple(t[2:4] for t in tensors)).fields["length/nll"].tolist() == [3.0, 1.0]


def test_an_empty_batch_gives_a_connected_zero(small, crowd):
    student, rows = crowd
    none = torch.zeros(6, dtype=torch.bool)
    objective = small.build(*(MANY_TERMS[i] for i in (0, 1, 2, 4))).at(0, {})
    hidden = student[none].requires_grad_()
    weight = torch.eye(VOCABULARY, dtype=torch.float64, requires_grad=True)
    empty = subset(rows, none)
    loss, columns = token_loss(objective, dict.fromkeys((*NAMES, EVERY_TOKEN), 1.0), selected_logprobs(hidden, weight, empty.ids), empty, {})
    loss.backward()
    assert loss.item() == 0.0 and weight.grad is not None and weight.grad.abs().sum() == 0.0
    assert meters(columns, empty, {EVERY_TOKEN: 5.0})["loss/total"].count == 0


def test_meters_add_up_to_the_loss_and_to_token_means(small, crowd):
    student, rows = crowd
    objective = small.build(*MANY_TERMS)
    whole = small.run(objective, student, rows)
    parts = [SEQUENCE == 0, SEQUENCE == 1, SEQUENCE == 2]
    sums: dict[str, list[float]] = {}
    for keep in parts:
        part = subset(rows, keep)
        for name, meter in meters(small.run(objective, student[keep], part, whole.divisors).columns, part, whole.divisors).items():
            old = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [old[0] + meter.sum, old[1] + meter.count]
    means = {name: total / count for name, (total, count) in sums.items() if count}
    assert means["loss/total"] == pytest.approx(whole.loss.item(), abs=1e-12)
    assert sum(means[f"loss/{name}"] for name in NAMES) == pytest.approx(whole.loss.item(), abs=1e-12)
    logp = student.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[rows.loss_mask].mean().item()
    assert means["entropy/student"] == pytest.approx(entropy, abs=1e-12)
    # routed loss tokens 0, 1, 2, 5 have log-ratios 0, -0.5, 0.5, 0.1 and A = 1, 1, 1, -2; clip(r, 0.8, 1.28) binds for A > 0 only at e^0.5
    assert means["clip_fraction/policy"] == pytest.approx(0.25)
    assert means["advantage_size/policy"] == pytest.approx(1.25)
    assert means["ratio/policy"] == pytest.approx(sum(torch.tensor([0.0, -0.5, 0.5, 0.1]).exp().tolist()) / 4, abs=1e-7)
    assert sums["engine_gap_nats"][1] == 0, "no policy sampled: nothing to compare"
    assert sums["gap/main"][1] == 4 and sums["gap/other"][1] == 5


def test_schedules_become_numbers(small):
    objective = small.build(
        {"nll": {}, "coef": {"linear": {"start": 1.0, "end": 0.0, "steps": 4, "begin": 2}}},
        {"nll": {}, "coef": {"switch": {"at": 3, "before": 0.25, "after": 2.0}}},
    )
    assert [term.name for term in objective.terms] == ["nll", "nll_2"]
    assert [objective.at(step, {}).terms[0].coef for step in (0, 2, 3, 5)] == [1.0, 1.0, 0.75, 0.25]
    assert [[term.name for term in objective.at(step, {}).terms] for step in (5, 6, 9)] == [["nll", "nll_2"], ["nll_2"], ["nll_2"]]
    assert [objective.at(step, {}).terms[1].coef for step in (0, 2, 3)] == [0.25, 0.25, 2.0]


def test_needs_name_what_earlier_steps_must_prepare(small):
    needs = small.build(*MANY_TERMS).needs
    assert (needs.old_logp, needs.entropy, needs.student_topk, needs.separable) == (True, False, 3, False)
    assert [term.name for term in needs.full_terms] == ["dense"]
    assert {name: (s.k, s.student_support, s.hidden) for name, s in needs.signals.items()} == {
        "main": (0, True, False),
        "other": (0, False, True),
    }
    light = small.build({"policy": "reinforce", "advantage": {"teacher_logratio": {"signal": "expert"}}, "weight": "student_confidence"}).needs
    assert (light.old_logp, light.entropy, light.separable, set(light.signals)) == (False, True, True, {"expert"})
