"""A small batch in which every number is known: logits of all parties at every token of eight answers to two prompts.

`Batch.run` sends it through `join`, `pack` and the real vocabulary operations; tests compare with sums written out over these logits.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from opd_kernels import dense_divergence, selected_logprobs
from opd_rollout.types import Completion, TokenScores

from opd.build.system import setting_of
from opd.config.load import load_recipe
from opd.learner.loss import hidden_distance
from opd.learner.packing import pack
from opd.objective import build_objective, denominators, join, token_loss, token_weight
from opd.types import Judged, Prepared, Prompt, Verdict

V = 7
LENGTHS = (3, 2, 4, 1, 2, 3, 5, 2)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0)


def log(p):
    return p.log_softmax(-1)


@dataclass
class Answer:
    """tokens [T]; now, old, engine, and one entry of `teachers` a signal: logits [T, V] fp64. inside: `now` where the student reads a view."""

    group: int
    reward: float
    tokens: torch.Tensor
    now: torch.Tensor
    old: torch.Tensor
    engine: torch.Tensor
    teachers: dict
    source: str = "student"
    domain: str = ""
    status: str = "score"
    masked: bool = False
    inside: torch.Tensor | None = None
    marks: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)

    def at(self, logits):
        """Log-probs of the answer's own tokens [T]."""
        return log(logits).gather(-1, self.tokens[:, None])[:, 0]


@dataclass
class Batch:
    answers: list = field(default_factory=list)

    @staticmethod
    def make(seed=0, signals=("main", "reference"), lengths=LENGTHS, rewards=REWARDS, groups=2, drift=0.3):
        g = torch.Generator().manual_seed(seed)
        rand = lambda n: torch.randn(n, V, dtype=torch.float64, generator=g)  # noqa: E731
        answers = []
        for index, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
            old = rand(length)
            tokens = torch.multinomial(old.softmax(-1), 1, generator=g)[:, 0]
            teachers = {name: 2.0 * rand(length) for name in signals}
            now, engine = old + drift * rand(length), old + 1.2 * rand(length)
            answers.append(Answer(index * groups // len(lengths), reward, tokens, now, old, engine, teachers))
        return Batch(answers)

    def samples(self, objective, pool=None, finish=None):
        judged, prepared, scores = [], [], []
        for index, a in enumerate(self.answers):
            member = sum(b.group == a.group for b in self.answers[:index])
            completion = Completion(
                token_ids=tuple(a.tokens.tolist()),
                logprobs=a.at(a.engine) if a.source != "dataset" else torch.full((len(a.tokens),), torch.nan, dtype=torch.float64),
                loss_mask=torch.full((len(a.tokens),), not a.masked),
                source=a.source,
                temperature=1.0,
                finish="stop",
                versions=(),
            )
            verdict = Verdict(status=a.status, reward=a.reward, correct=a.reward > 0.5)
            prompt = Prompt(id=str(a.group), messages=(), domain=a.domain)
            known = {"marks": a.marks, "notes": a.notes}
            judged.append(
                Judged(prompt=prompt, prompt_ids=(1, 2), completion=completion, text="", verdict=verdict, group=a.group, member=member, **known)
            )
            old = log(a.old)
            k = objective.needs.student_topk or 1
            top = old.topk(k, dim=-1)
            ids = torch.cat([a.tokens[:, None], torch.where(top.indices == a.tokens[:, None], -1, top.indices)], -1)
            prepared.append(
                Prepared(
                    old_logp=a.at(a.old),
                    entropy=-(old.exp() * old).sum(-1),
                    topk_ids=ids,
                    topk_logp=torch.where(ids >= 0, old.gather(-1, ids.clamp_min(0)), -1e4),
                )
            )
            needs = objective.needs.signals
            joint = union_ids(ids, {name: (a.teachers[name], need.union) for name, need in needs.items() if need.union and name in a.teachers})
            scores.append({name: scored(a, z, needs[name], joint if needs[name].union else ids) for name, z in a.teachers.items() if name in needs})
        views = {name: [(9, 1, 2)] * len(judged) for name in objective.contexts}
        return join(judged, prepared, scores, objective, *([pool] if pool else []), views=views)

    def run(self, objective, step=0, last=None, together=False):
        """(loss, [gradient in each answer's `now` logits], samples): one micro-batch an answer, or all in one."""
        objective = objective.at(step, last or {})
        samples = self.samples(objective)
        options = {"signals": objective.needs.signals, "token_budget": 10**6, "packed": True, "temperature": 1.0, "pad_id": 0}
        if together:
            batches = pack(samples, **options)
            order = [s for batch in batches for s in batch.rows.sequence.unique_consecutive().tolist()]
            assert len(batches) == 1 and order == sorted(order)
            total = len(samples)
            rows = batches[0].rows
            places = [next(i for i in range(total) if same_answer(rows, n, samples[i])) for n in range(total)]
            parts = [torch.cat([self.answers[i].now for i in places])]
        else:
            batches = [batch for sample in samples for batch in pack([sample], **options)]
            own = [sum(not s.context for s in samples[: n + 1]) - 1 for n in range(len(samples))]
            parts = [self.answers[n].inside if s.context else self.answers[n].now for n, s in zip(own, samples, strict=True)]
        shared = denominators(objective, batches, lambda counts: counts)
        loss, gradients = torch.zeros((), dtype=torch.float64), []
        for batch, logits in zip(batches, parts, strict=True):
            value, gradient = one_batch(objective, shared, logits, batch.rows)
            loss = loss + value
            gradients.append(gradient)
        self.inside_gradients = [g for g, s in zip(gradients, samples, strict=False) if s.context and not together]
        if not together:
            gradients = [g for g, s in zip(gradients, samples, strict=True) if not s.context]
        if together:
            lengths = [len(self.answers[i].tokens) for i in places]
            pieces = dict(zip(places, gradients[0].split(lengths), strict=True))
            gradients = [pieces[i] for i in range(total)]
        return loss, gradients, samples

    def expect(self, objective, loss_of, atol=1e-10, **more):
        """Runs it, and the function (answers with `now` requiring gradients) -> loss; both numbers and all gradients must agree."""

        def leaf(logits):
            return None if logits is None else logits.clone().requires_grad_()

        loss, gradients, _ = self.run(objective, **more)
        free = Batch([replace(a, now=leaf(a.now), inside=leaf(a.inside)) for a in self.answers])
        expected = loss_of(free.answers)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=atol)
        for answer, found in zip(free.answers, gradients, strict=True):
            wanted = torch.zeros_like(found) if answer.now.grad is None else answer.now.grad
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
        for answer, found in zip(free.answers, self.inside_gradients, strict=False):
            wanted = torch.zeros_like(found) if answer.inside.grad is None else answer.inside.grad
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
        return gradients


def same_answer(rows, number, sample):
    mine = rows.sequence == number
    a = sample.judged.completion
    return rows.token[mine].tolist() == list(a.token_ids) and torch.equal(rows.behaviour_logp[mine].nan_to_num(), a.logprobs.nan_to_num())


def one_batch(objective, shared, logits, rows):
    weight = torch.eye(V, dtype=torch.float64)
    logits = logits.detach().clone().requires_grad_()
    tail = any(term.support is not None and term.support.sparse for term in objective.terms)
    selected = selected_logprobs(logits, weight, rows.ids, tail=tail)
    full = {}
    for term in objective.needs.full_terms:
        hidden = rows.signals[term.signal].hidden
        if hidden is None:  # no answer here has the view, as in opd.learner.loss
            full[term.name] = logits.new_zeros(len(logits))
            continue
        if term.support.kind == "hidden":
            full[term.name] = hidden_distance(logits, hidden)
            continue
        factor = token_weight(term, shared, selected, rows)
        full[term.name] = dense_divergence(logits, weight, hidden, weight, term.dense, token_weight=factor)
    loss, _ = token_loss(objective, shared, selected, rows, full)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), torch.zeros_like(logits) if logits.grad is None else logits.grad


def union_ids(student_ids, others):
    """[T, K]: the student's ids and every other's likeliest, once each, padded."""
    rows = []
    for t, row in enumerate(student_ids.tolist()):
        chosen = [i for i in row if i >= 0]
        for logits, k in others.values():
            chosen += [i for i in logits[t].topk(k).indices.tolist() if i not in chosen]
        rows.append(chosen)
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows]).reshape(len(rows), width)


def scored(answer, logits, need, student_ids):
    logp, token = log(logits), answer.tokens[:, None]
    if need.student_support or need.union:
        ids = student_ids
    elif need.k:
        top = logp.topk(need.k, dim=-1).indices
        ids = torch.cat([token, torch.where(top == token, -1, top)], -1)
    else:
        ids = token
    inside = torch.zeros_like(logp, dtype=torch.bool)
    for column in ids.unbind(-1):
        real = column >= 0
        inside[real, column[real]] = True
    return TokenScores(
        sampled=logp.gather(-1, token)[:, 0],
        ids=ids,
        logp=torch.where(ids >= 0, logp.gather(-1, ids.clamp_min(0)), -1e4),
        tail_logp=torch.where(inside, -torch.inf, logp).logsumexp(-1).clamp_min(-1e4),
        entropy=-(logp.exp() * logp).sum(-1),
        hidden=logits if need.hidden else None,
        temperature=1.0,
        version=0,
        view_hash="",
    )


FOLDER = Path(__file__).parents[2] / "recipes" / "methods"


def load(name, *, without=(), max_tokens=5, k=3, **changes):
    """(recipe, objective) of a method file. without: "term.key" entries to delete; changes: term__key=value. k of top-k supports."""
    recipe = load_recipe(str(FOLDER / f"{name}.yaml"))
    specs = [dict(term) for term in recipe.objective]
    for entry in without:
        number, key = entry.split(".")
        del specs[int(number)][key]
    for place, value in changes.items():
        number, key = place.removeprefix("t").split("__")
        specs[int(number)][key] = value
    for spec in specs:
        support = spec.get("support")
        if isinstance(support, dict) and k:
            [(kind, parameters)] = support.items()
            spec["support"] = {kind: {**parameters, **({"k": k} if "k" in parameters else {})}}
    return recipe, build_objective(specs, replace(setting_of(recipe), max_tokens=max_tokens))
