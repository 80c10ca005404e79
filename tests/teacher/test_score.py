"""One stage scores every signal: by hand from a model's logits, with views missing, and refused where a scorer cannot deliver."""

import torch
from opd_rollout.types import TokenScores
from pytest import approx, mark, raises

from opd.objective import SignalNeeds
from opd.teacher.local import LocalTeacher, frozen_copy
from opd.teacher.score import SignalScorer, Weights
from opd.types import Prepared
from tests.learner.cases import VOCABULARY, answers, contexts, tiny_model


def teacher(model=None, **options) -> LocalTeacher:
    return LocalTeacher(model or tiny_model(5), **{"temperature": 1.0, "token_budget": 40, **options})


def by_hand(model, context, tokens) -> torch.Tensor:
    """[T, V] log-probs."""
    logits = model(torch.tensor([[*context, *tokens]])).logits[0].float()
    return logits[len(context) - 1 : len(context) - 1 + len(tokens)].log_softmax(-1)


def weights(source: LocalTeacher) -> Weights:
    return Weights(scores=source.scores, head=source.head)


def test_scores_are_the_teachers_own_log_probs_of_the_students_tokens_under_each_view():
    """Two signals, same weights: one reads the privileged context, the other the question alone."""
    model, judged = tiny_model(5), answers()
    source = weights(teacher(model))
    scorer = SignalScorer({"main": source, "reference": source}, {"main": SignalNeeds(k=3), "reference": SignalNeeds()})
    views = {"main": contexts(judged), "reference": [one.prompt_ids for one in judged]}
    found = scorer.score(judged, views, [None] * len(judged))
    assert "main" not in found[2] and "reference" in found[2]
    for index, one in enumerate(judged):
        tokens = one.completion.token_ids
        for name, scores in found[index].items():
            logp = by_hand(model, views[name][index], tokens)
            expected = logp[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)]
            assert torch.allclose(scores.sampled, expected, atol=1e-5)
            assert torch.allclose(scores.entropy, -(logp.exp() * logp).sum(-1), atol=1e-4)
            assert scores.ids.shape == (len(tokens), 4 if name == "main" else 1)
            assert scores.version == 0
    hashes = {scores.view_hash for one in found for scores in one.values()}
    assert len(hashes) == len({view for name in views for view in views[name] if view is not None})


def test_student_ids_are_scored_as_they_were_prepared():
    model, judged = tiny_model(5), answers(4)
    prepared = []
    for one in judged:
        length = len(one.completion.token_ids)
        ids = torch.arange(length * 3).reshape(length, 3) % VOCABULARY
        prepared.append(Prepared(old_logp=torch.zeros(length), entropy=torch.zeros(length), topk_ids=ids))
    scorer = SignalScorer({"main": weights(teacher(model))}, {"main": SignalNeeds(student_support=True)})
    views = {"main": [one.prompt_ids for one in judged]}
    for one, ready, found in zip(judged, prepared, scorer.score(judged, views, prepared), strict=True):
        logp = by_hand(model, one.prompt_ids, one.completion.token_ids)
        assert torch.equal(found["main"].ids, ready.topk_ids)
        assert torch.allclose(found["main"].logp, logp.gather(1, ready.topk_ids), atol=1e-5)


def test_a_union_holds_everybodys_likeliest_ids_and_is_exact_on_all_sides():
    """Two teachers and the student: the same ids for both, each once; an answer without a view for one teacher has the union of the others."""
    models = {"main": tiny_model(5), "reference": tiny_model(6)}
    judged, k = answers(4), 3
    prepared = []
    for one in judged:
        top = by_hand(tiny_model(0), one.prompt_ids, one.completion.token_ids).topk(k).indices
        token = torch.tensor(one.completion.token_ids, dtype=torch.int64)[:, None]
        ids = torch.cat([token, torch.where(top == token, -1, top)], 1)
        prepared.append(Prepared(old_logp=torch.zeros(len(ids)), entropy=torch.zeros(len(ids)), topk_ids=ids))
    needs = {"main": SignalNeeds(union=k), "reference": SignalNeeds(union=k), "third": SignalNeeds(student_support=True)}
    scorer = SignalScorer({name: weights(teacher(models.get(name, models["main"]))) for name in needs}, needs)
    plain = [one.prompt_ids for one in judged]
    views = {"main": plain, "reference": [None, *plain[1:]], "third": plain}
    found = scorer.score(judged, views, prepared)
    for index, (one, ready) in enumerate(zip(judged, prepared, strict=True)):
        tokens = one.completion.token_ids
        logp = {name: by_hand(model, one.prompt_ids, tokens) for name, model in models.items() if name in found[index]}
        assert set(logp) == {"main"} if index == 0 else set(logp) == {"main", "reference"}
        assert torch.equal(found[index]["third"].ids, ready.topk_ids), "a student_topk support beside it keeps its own ids"
        for name, exact in logp.items():
            scores = found[index][name]
            assert torch.equal(scores.ids, found[index]["main"].ids)
            for t in range(len(tokens)):
                row = [i for i in scores.ids[t].tolist() if i >= 0]
                expected = {i for i in ready.topk_ids[t].tolist() if i >= 0}.union(*(z[t].topk(k).indices.tolist() for z in logp.values()))
                assert set(row) == expected and len(row) == len(set(row))
                assert torch.allclose(scores.logp[t][scores.ids[t] >= 0], exact[t, row], atol=1e-5)
                outside = [i for i in range(VOCABULARY) if i not in row]
                assert torch.allclose(scores.tail_logp[t], exact[t, outside].logsumexp(0), atol=1e-5)
    passed = [sum(len(one.prompt_ids) + len(one.completion.token_ids) for one in some) for some in (judged, judged[1:])]
    assert scorer.meters()["tokens/teacher"].sum == 2 * passed[0] + 2 * passed[1] + passed[0], "two passes for a union"
    with raises(ValueError, match="serves two of the supports"):
        SignalScorer({"main": weights(teacher())}, {"main": SignalNeeds(union=3, k=2)})


def test_hidden_states_and_their_head_give_the_whole_distribution():
    model, judged = tiny_model(5), answers(4)
    scorer = SignalScorer({"main": weights(teacher(model))}, {"main": SignalNeeds(hidden=True)})
    found = scorer.score(judged, {"main": [one.prompt_ids for one in judged]}, [None] * 4)
    head = scorer.heads()["main"]
    assert not head.weight.requires_grad
    for one, scores in zip(judged, found, strict=True):
        logp = (scores["main"].hidden @ head.weight.T).log_softmax(-1)
        assert torch.allclose(logp, by_hand(model, one.prompt_ids, one.completion.token_ids), atol=1e-5)


def test_tokens_and_views_are_counted():
    judged = answers(8)
    scorer = SignalScorer({"main": weights(teacher())}, {"main": SignalNeeds()})
    views = contexts(judged)
    scorer.score(judged, {"main": views}, [None] * 8)
    expected = sum(len(view) + len(one.completion.token_ids) for view, one in zip(views, judged, strict=True) if view is not None)
    assert scorer.meters()["tokens/teacher"].sum == expected
    assert scorer.meters()["views/main"].mean == approx(7 / 8)


@mark.parametrize("packed", [False, True])
@mark.parametrize("budget", [1, 4096])
def test_batches_and_packing_do_not_change_scores(packed, budget):
    model, judged = tiny_model(5, dtype=torch.float64), answers()
    views = {"main": contexts(judged)}
    plain, other = (
        SignalScorer({"main": weights(teacher(model, **options))}, {"main": SignalNeeds(k=2)}).score(judged, views, [None] * 8)
        for options in ({}, {"packed": packed, "token_budget": budget})
    )
    for one, two in zip(plain, other, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.allclose(one[name].logp, two[name].logp, atol=1e-9) and torch.equal(one[name].ids, two[name].ids)


def test_temperature_divides_the_teachers_logits_too():
    model, judged = tiny_model(5), answers(4)
    scorer = SignalScorer({"main": weights(teacher(model, temperature=0.5))}, {"main": SignalNeeds()})
    one, found = judged[0], scorer.score(judged, {"main": [one.prompt_ids for one in judged]}, [None] * 4)[0]["main"]
    tokens = one.completion.token_ids
    logp = (2.0 * by_hand(model, one.prompt_ids, tokens)).log_softmax(-1)
    assert torch.allclose(found.sampled, logp[torch.arange(len(tokens)), torch.tensor(tokens)], atol=1e-5)
    assert found.temperature == 0.5


def test_a_frozen_copy_does_not_follow_the_student():
    model = tiny_model()
    copy = frozen_copy(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    assert copy.model.norm.weight.max() == 1.0 and not any(parameter.requires_grad for parameter in copy.parameters())
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_scorer_cannot_deliver_is_refused_before_any_work():
    def remote(requests):
        return []

    with raises(ValueError, match="Add signals.main"):
        SignalScorer({}, {"main": SignalNeeds()})
    with raises(ValueError, match="declare a second signal"):
        SignalScorer({"main": Weights(scores=remote)}, {"main": SignalNeeds(k=3, student_support=True)})
    with raises(ValueError, match="use teacher_topk or student_topk"):
        SignalScorer({"main": Weights(scores=remote)}, {"main": SignalNeeds(hidden=True)})


@mark.parametrize("fault", ["too few answers", "too few tokens"])
def test_a_scorer_that_leaves_something_out_is_caught(fault):
    source = teacher()

    def faulty(requests) -> list[TokenScores]:
        scores = source.scores(requests)
        if fault == "too few answers":
            return scores[:-1]
        one = scores[0]
        cut = TokenScores(
            sampled=one.sampled[:-1], ids=one.ids, logp=one.logp, tail_logp=one.tail_logp, entropy=one.entropy,
            temperature=1.0, version=0, view_hash="",
        )
        return [cut, *scores[1:]]

    judged = answers(4)
    scorer = SignalScorer({"main": Weights(scores=faulty)}, {"main": SignalNeeds()})
    with raises((ValueError, AssertionError)):
        scorer.score(judged, {"main": [one.prompt_ids for one in judged]}, [None] * 4)
