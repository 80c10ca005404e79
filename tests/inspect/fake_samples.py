"""Invented samples with consistent shapes, for the token viewer."""

import torch
from opd_rollout.types import Completion, TokenScores

from opd.types import Judged, Prepared, Prompt, Sample, Verdict

WORDS = ["(", "3", "+", "5", ")", "*", "2", "=", "1", ";", "6", "<b>", "\n", "$"]


class WordTokenizer:
    """Ids are indices of WORDS."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(WORDS[token] for token in token_ids)


def fake_sample(n, *, length=18, seed=0):
    """Answer n: the teacher called main has a view unless n % 5 == 4; the term grpo has an advantage, distill only a weight."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    ids = torch.randint(0, len(WORDS), (length,), generator=generator)
    logits = torch.randn(length, len(WORDS), generator=generator) * 2
    logits[torch.arange(length), ids] += 2
    student = logits.log_softmax(-1)
    teacher = (logits + torch.randn(length, len(WORDS), generator=generator)).log_softmax(-1)
    right = n % 3 != 0
    prompt = Prompt(id=f"expr-{n // 4}", messages=({"role": "user", "content": f"(3+{n})*2</script>"},), answer=str(n % 7))
    completion = Completion(
        token_ids=tuple(ids.tolist()),
        logprobs=student[torch.arange(length), ids],
        loss_mask=torch.ones(length, dtype=torch.bool),
        source="student",
        temperature=1.0,
        finish="length" if n % 7 == 6 else "stop",
        versions=((0, 0, length),),
    )
    top = teacher.topk(5)
    scores = TokenScores(
        sampled=teacher[torch.arange(length), ids],
        ids=torch.cat([ids[:, None], top.indices.masked_fill(top.indices == ids[:, None], -1)], 1),
        logp=torch.cat([teacher.gather(1, ids[:, None]), top.values], 1),
        tail_logp=torch.full((length,), -3.0),
        entropy=-(teacher.exp() * teacher).sum(-1),
        temperature=1.0,
        version=0,
        view_hash="fake",
    )
    mine = student.topk(5)
    judged = Judged(
        prompt=prompt,
        prompt_ids=(0, 1, 2),
        completion=completion,
        text=WordTokenizer().decode(ids.tolist(), skip_special_tokens=True),
        verdict=Verdict(reward=float(right), correct=right, feedback="" if right else "3+5=1, not 2"),
        group=n // 4,
        member=n % 4,
    )
    return Sample(
        judged=judged,
        scores={} if n % 5 == 4 else {"main": scores},
        advantage={"grpo": torch.full((length,), 0.7 if right else -0.4)},
        route={"grpo": 1.0, "distill": 0.0 if n % 5 == 4 else 1.0},
        prepared=Prepared(
            old_logp=student[torch.arange(length), ids], entropy=-(student.exp() * student).sum(-1), topk_ids=mine.indices, topk_logp=mine.values
        ),
    )


def fake_contexts(judged):
    """What the teacher read before each answer: the fifth of five has no view."""
    return {"main": [None if n % 5 == 4 else (0, 1, 2, 3, 4, n % 10) for n in range(len(judged))]}
