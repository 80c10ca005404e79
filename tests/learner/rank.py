"""One rank of tests/learner/test_ranks.py: `python rank.py OUT STAGE`; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the test."""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from functools import partial

import torch

from opd.learner.deepspeed_learner import OFFLOADED, deepspeed_learner
from opd.objective import build_objective
from tests.learner import cases

STEPS = 3
RATE = cases.optimizer(eps=1e-3)  # a large eps: where gradients vanish, AdamW would otherwise turn rounding into whole steps


def share(judged, rank: int, world: int) -> list:
    """Rank 0 has one group of answers, rank 1 the rest; nobody else has any, and a single rank has them all."""
    if world == 1:
        return list(judged)
    return [one for one in judged if min(one.group, 1) == rank]


def run(learner, spec, rank: int, world: int, *, steps: int = STEPS, spoil_step: int = -1, idle_step: int = -1) -> list:
    """`steps` rounds; in one of them rank 0 brings a NaN, in another it has no answers at all."""
    objective = build_objective(spec)
    scorer = cases.teacher_of(cases.tiny_model(5), objective)
    reports = []
    for _ in range(steps):
        step = learner.version
        judged = share(cases.answers(12, seed=step), rank, world)
        if step == idle_step:
            judged = judged if rank else []
        samples = cases.samples_for(learner, judged, objective, scorer)
        if step == spoil_step and rank == 0:
            for sample in samples:
                for advantage in sample.advantage.values():
                    advantage.fill_(float("nan"))
        reports.append(learner.step(samples, objective.at(step, {}), scorer.heads()))
    return reports


def main(out: Path, stage: int, other: str = "") -> None:
    """other: a checkpoint of another number of ranks to go on from, as well."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}  # else DeepSpeed keeps small parameters whole
    build = partial(deepspeed_learner, zero_stage=stage, zero_options=options)
    result = {}
    for name, spec, changes in [
        ("hybrid", cases.HYBRID, {}),
        ("student_topk", cases.STUDENT_TOPK, {}),
        ("nan", cases.GRPO, {"spoil_step": 1}),
    ]:
        learner = build(cases.tiny_model(), RATE, cases.settings(ema_rate=0.3))
        reports = run(learner, spec, rank, world, **changes)
        result[name] = summary(learner, reports)
        if name == "hybrid":
            learner.save(out.parent / f"checkpoint-{out.stem}")
            learner.export(out.parent / f"model-{out.stem}")
            result["later"] = summary(learner, run(learner, spec, rank, world, steps=2))
            again = build(cases.tiny_model(8), RATE, cases.settings(ema_rate=0.3))
            again.load(out.parent / f"checkpoint-{out.stem}")
            result["resumed"] = summary(again, run(again, spec, rank, world, steps=2))
            again.close()
            if other:
                moved = build(cases.tiny_model(8), RATE, cases.settings(ema_rate=0.3))
                moved.load(Path(other))
                result["moved"] = summary(moved, run(moved, spec, rank, world, steps=2))
                moved.close()
        learner.close()
    if world > 1:
        learner = build(cases.tiny_model(), RATE, cases.settings())
        result["idle"] = summary(learner, run(learner, cases.NLL, rank, world, idle_step=1))
        learner.close()
    if world == 1 or stage == 2:  # bf16 weights over fp32 masters; the optimiser's state in host memory
        learner = build(cases.tiny_model(dtype=torch.bfloat16), RATE, cases.settings())
        result["bf16"] = summary(learner, run(learner, cases.HYBRID, rank, world))
        learner.close()
    if stage == 2:
        learner = build(cases.tiny_model(), RATE, cases.settings(ema_rate=0.3), zero_options={**options, **OFFLOADED})
        result["offloaded"] = summary(learner, run(learner, cases.HYBRID, rank, world))
        learner.close()
    if world > 1 and stage < 2:
        learner = build(cases.tiny_model(), RATE, cases.settings())
        if rank == 0:
            make_memory_short(learner, 32)
        result["memory"] = summary(learner, run(learner, cases.NLL, rank, world)) | {"budget": learner.token_budget}
        learner.close()
        learner = build(cases.tiny_model(), RATE, cases.settings())
        result["memory_wanted"] = summary(learner, run(learner, cases.NLL, rank, world))
        learner.close()
    if rank == 0:
        torch.save(result, out)


def make_memory_short(learner, tokens: int) -> None:
    plain = learner.policy.forward

    def forward(layout, request):
        if layout.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("injected")
        return plain(layout, request)

    learner.policy.forward = forward


def summary(learner, reports) -> dict:
    return {
        "losses": [report.meters["loss/total"].mean for report in reports],
        "tokens": [report.meters["tokens/learner"].sum for report in reports],
        "norms": [report.meters["gradient_norm"].mean if "gradient_norm" in report.meters else None for report in reports],
        "skipped": [report.skipped for report in reports],
        "weights": cases.weights_of(learner),
        "ema": {} if learner._shadow is None else {name: learner._updater.joined(name, t).clone() for name, t in learner._shadow.tensors.items()},
        "held": 0 if learner._shadow is None else sum(tensor.numel() for tensor in learner._shadow.tensors.values()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    os._exit(0)  # as the launcher's ranks end: a process group whose peers are gone may not end by itself
