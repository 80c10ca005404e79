"""Every kind of mistake, an example of each, and what `opd check` says of it; `python -m tests.preflight.mistakes` writes the page."""

import json
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/mistakes.md"
EXPR, GRPO, OPD, SFT = (f"recipes/runs/{name}_expr.yaml" for name in ("opsd", "grpo", "opd", "sft"))
HUB = "recipes/runs/opsd_qwen3_0.6b_gsm8k.yaml"
FILE = {"data.task": "", "data.path": "one.jsonl"}
SERVED = {"external": {"path": "models/expr-teacher", "engine": "vllm"}}
SHARED = {"external": {**SERVED["external"], "tensor_parallel": 3}}

SCORED = {"objective": [{"distill": "forward_kl", "support": {"teacher_topk": {"k": 4}}}], "rollout.source": {"dataset": "solution"}, "group": 1}

FILES = {
    "bad_gold.jsonl": [{"question": "a", "answer": "1"}, {"question": "b", "answer": "(((("}],
    "no_answer.jsonl": [{"question": "a"}],
    "not_json.jsonl": ["{oops"],
    "many.jsonl": [{"question": f"{number}+0", "answer": str(number)} for number in range(40)],
    "one.jsonl": [{"question": "a", "answer": "1"}],
}


def distilled(divergence, **support):
    return [{"distill": divergence, "support": {"teacher_topk": support}}]


KINDS = {
    "Keys and values": {
        "unknown key": (EXPR, {"optimizer.lrr": 1e-4}, "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)"),
        "another project's key": (EXPR, {"num_generations": 8}, "unknown key 'num_generations' (did you mean 'group'?)"),
        "a key that does not exist here": (EXPR, {"max_turns": 3}, "opd trains single answers to a prompt"),
        "wrong type": (EXPR, {"optimizer.lr": "fast"}, "optimizer.lr: must be a number (found 'fast')"),
        "out of range": (EXPR, {"rollout.prompts": 0}, "rollout.prompts: must be above 0"),
        "trained weights made smaller": (EXPR, {"model.scale": 0.5}, "model.scale is 0.5: weights that were trained cannot be made smaller"),
        "too short for its profile": (EXPR, {"steps": 3, "profile.steps": 3}, "profile.steps is 3, and steps is 3"),
        "another format": (EXPR, {"schema_version": 2}, "schema_version is 2, and this opd reads 1"),
    },
    "Sampling and lengths": {
        "greedy training": (GRPO, {"sampling.temperature": 0}, "error: sampling.temperature is 0"),
        "truncated sampling": (EXPR, {"sampling.top_p": 0.9}, "warning: sampling.top_p or top_k cuts"),
        "cold sampling": (GRPO, {"sampling.temperature": 0.3}, "warning: sampling.temperature=0.3"),
        "no room": (EXPR, {"sampling.max_tokens": 512}, "error: sampling.max_tokens=512 leaves no room"),
        "long prompts": (EXPR, {"data.max_prompt_tokens": 5}, "prompts are longer than 5 tokens"),
        "short answers": (EXPR, {"sampling.max_tokens": 4}, "is shorter than 100% of the reference solutions: answers"),
        "cut demonstrations": ("recipes/runs/base_expr.yaml", {"sampling.max_tokens": 4}, "is shorter than 100% of the demonstrations: answers"),
        "cut texts": (SFT, {"sampling.max_tokens": 4, "rollout.source": {"dataset": "facts"}}, "of the data's texts 'facts'"),
    },
    "Batches, groups and budgets": {
        "minibatches": (GRPO, {"updates.minibatches": 5}, "do not divide into updates.minibatches=5"),
        "too many minibatches": (GRPO, {"updates.minibatches": 1000}, "error: updates.minibatches=1000 exceeds"),
        "learner budget": (EXPR, {"learner.token_budget": 8}, "warning: learner.token_budget=8"),
        "engine budget": (EXPR, {"engine.token_budget": 8}, "warning: engine.token_budget=8"),
        "group of one": (GRPO, {"group": 1}, "group is 1. Legal: group: 2 or more; advantage: raw_reward or teacher_logratio; or a method"),
        "filter without groups": (EXPR, {"group": 1, "rollout.filter": "mixed_groups"}, "error: rollout.filter=mixed_groups with group=1"),
        "ranks that cannot share": (EXPR, {"learner.ranks": 3}, "rollout.prompts is 32, which 3 ranks cannot share evenly"),
        "one process, two ranks": (EXPR, {"learner.ranks": 2, "learner.kind": "torch"}, "learner.kind torch is one process"),
        "a budget without a price": (EXPR, {"budget.money": 5}, "budget.money=5 needs a price"),
    },
    "Rates and precision": {
        "warm-up": (EXPR, {"optimizer.warmup_steps": 999}, "error: optimizer.warmup_steps=999"),
        "high rate": (EXPR, {"optimizer.lr": 0.1}, "warning: optimizer.lr=0.1 is high"),
        "low rate": (EXPR, {"optimizer.lr": 1e-7, "model.lora": {"rank": 4}}, "warning: optimizer.lr=1e-07 is low for LoRA"),
        "bf16 on a CPU": (EXPR, {"model.dtype": "bfloat16"}, "warning: model.dtype=bfloat16 on a CPU"),
    },
    "Adapters and several GPUs": {
        "adapters on no layer": (EXPR, {"model.lora": {"rank": 4, "targets": ["q_prj"]}}, "no linear layer 'q_prj' (did you mean 'q_proj'?)"),
        "adapters on the head": (EXPR, {"model.lora": {"rank": 4, "targets": ["lm_head"]}}, "error: model.lora.targets names lm_head"),
        "one layer as a pattern": (EXPR, {"model.lora": {"rank": 4, "targets": "q_proj"}}, "no linear layer 'q_proj'"),
        "shards without DeepSpeed": (EXPR, {"learner.kind": "torch", "learner.zero_stage": 3}, "warning: learner.zero_stage=3 is DeepSpeed's"),
        "tensor parallel without vLLM": (EXPR, {"engine.tensor_parallel": 2}, "engine.tensor_parallel=2 is vLLM's, and engine.kind is torch"),
        "heads that do not divide": (HUB, {"engine": {"kind": "vllm", "tensor_parallel": 3}}, "does not divide the student's 16 attention heads"),
        "heads of a teacher": (OPD, {"teacher": SHARED}, "signals.main: tensor_parallel=3 does not divide the teacher's 4 attention heads"),
        "vLLM's own key": (HUB, {"engine.gpu_memory_utilization": 0.9}, "did you mean 'engine.memory_share'?"),
    },
    "Teachers, views and objective": {
        "live teacher": (EXPR, {"teacher": "live"}, "warning: signals.main: a live teacher"),
        "average that never moves": (EXPR, {"teacher": {"ema": {"rate": 0.0}}}, "an EMA rate of 0 never moves"),
        "average that is live": (EXPR, {"teacher": {"ema": {"rate": 1.0}}}, "an EMA rate of 1 is the live model"),
        "K above the vocabulary": (EXPR, {"objective": distilled("forward_kl", k=99)}, "support k is 99 but the vocabulary"),
        "illegal objective": (EXPR, {"objective": distilled("reverse_kl", k=4, tail="drop")}, "over a truncated support is no divergence"),
        "no such hint": (EXPR, {"view": {"hint": {"name": "poem"}}}, "no template 'poem'; known: answer, facts"),
        "no such view": (EXPR, {"view": "solutoin"}, "did you mean 'solution'"),
        "no teacher": (OPD, {"teacher": {"external": {"path": ""}}}, "Without one: a method whose teacher is the student itself"),
        "no reference solution": (
            EXPR,
            FILE | {"data.path": "many.jsonl", "view": "solution"},
            "or a method that needs no texts of the data's: grpo",
        ),
        "no solution to imitate": (
            EXPR,
            FILE | {"data.path": "many.jsonl", "rollout.source": {"dataset": "solution"}},
            "student answers itself needs none",
        ),
        "foreign teacher": (OPD, {"teacher": {"external": {"path": "models/route-teacher"}}}, "with the methods alm, gold or uld"),
        "K above what vLLM returns": (OPD, {"teacher": SERVED, "objective": distilled("forward_kl", k=200)}, "at most, not k=200: lower k"),
        "hidden states of vLLM": (OPD, {"teacher": SERVED}, "is served by vLLM, which hands out no hidden states"),
        "a teacher that draws, elsewhere": (EXPR, {"engine": "process", "rollout.sampler": "teacher"}, "draws tokens from two models"),
        "a teacher that draws and has no model": (EXPR, {"teacher": "live", "rollout.sampler": "teacher"}, "which has no model of its own here"),
        "a teacher that draws, unknown": (EXPR, {"rollout.sampler": "teachr"}, "did you mean 'teacher'"),
        "no file of scores": (EXPR, SCORED | {"signals.main.scores": "none.sqlite"}, "none.sqlite"),
        "scores that cannot be stored": (EXPR, {"signals.main.scores": "none.sqlite"}, "support full reads hidden states"),
        "a domain without prompts": (EXPR, {"signals.main.domain": "law"}, "'law'"),
        "a note that nobody writes": (EXPR, {"view": {"note": {"name": "remark"}}}, "reads what 'remark' writes"),
    },
    "Models, data and runs": {
        "no such model": (EXPR, {"model.path": "models/expr-bsae"}, "did you mean 'expr-base'"),
        "no such task": (EXPR, {"data.task": "exrp"}, "did you mean 'expr'"),
        "no such file": (EXPR, FILE | {"data.path": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        "no such preset": (EXPR, {"data.task": "", "data.preset": "gsm9k"}, "did you mean 'gsm8k'"),
        "no such run": (EXPR, {"init": "runs/none"}, "init: runs/none is no run folder"),
        "a shape that cannot be": (EXPR, {"model.path": "", "model.shape": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        "a gold answer that does not parse": (EXPR, FILE | {"data.path": "bad_gold.jsonl"}, "bad_gold.jsonl:2: the gold answer '((((' cannot be"),
        "a verifier of other answers": (EXPR, {"data.verifier": "code"}, "data.verifier: 'code' does not accept the task's own answers"),
        "a missing column": (EXPR, FILE | {"data.path": "no_answer.jsonl"}, "no_answer.jsonl:1: the record has no answer"),
        "not JSON": (EXPR, FILE | {"data.path": "not_json.jsonl"}, "not_json.jsonl:1: malformed JSON"),
        "too few records": (EXPR, FILE, "cannot hold out"),
        "duplicates of a stream": (EXPR, FILE | {"data.stream": True, "data.repair": ["duplicate"]}, "which a stream does not keep"),
        "no such model on the hub": (HUB, {"model.path": "Qwen/Qwen3-0.6"}, "the hub cannot be asked for it (did you mean 'Qwen/Qwen3-0.6B'?)"),
        "the hub cannot be reached": (HUB, {}, "warning: the hub cannot be reached, so Qwen/Qwen3-0.6B"),
        "an unknown card": (EXPR, {"target.device": "h1000"}, "device=h1000: no figures for it (did you mean 'h100'?)"),
    },
    "Packages, logins and machine": {
        "flash attention": (EXPR, {"model.attention": "flash_attention_2"}, "error: model.attention=flash_attention_2 needs the package"),
        "no key": (EXPR, {"track.wandb": "online"}, "error: track.wandb is online, but nobody is logged in"),
        "Liger without a GPU": (EXPR, {"model.liger": True}, "error: model.liger: Liger's layers are Triton kernels"),
        "two models in one process": (EXPR, {"asynchrony.max_staleness": 1}, "it needs a process of its own: use engine.kind=process"),
    },
    "Evaluation": {
        "few test problems": (EXPR, {"eval.final_problems": 16}, "the standard error of an accuracy near one half is 12 points"),
        "no dev": (EXPR, {"eval.num_problems": 0}, "note: eval.num_problems=0"),
    },
}
"""Subject -> mistake -> (recipe, what is changed in it, a part of what is said)."""

ELSEWHERE = {
    "a tokenizer without an end, or another one than the generation config": "test_tokenizer_trouble",
    "a head with fewer rows than the tokenizer has tokens, or with more": "test_tokenizer_trouble",
    "a tokenizer without a chat template": "test_no_template_and_no_end",
    "a teacher that was made for another chat template": "test_a_teacher_of_another_template",
    "a GPU whose memory share holds a teacher's weights, and no sequence beside them": "test_a_cache_that_holds_no_sequence",
    "a port that is taken": "test_a_port_that_is_taken_and_a_full_disk",
    "a disk on which the checkpoints do not fit": "test_a_port_that_is_taken_and_a_full_disk",
    "a model that does not fit the device: its largest part, the remedy": "test_a_model_that_is_too_large_names_the_largest_part_and_the_remedy",
    "a package outside the tested versions": "test_versions_and_missing_packages",
    "a missing package, with the extra that has it": "test_versions_and_missing_packages",
    "a folder that holds another run": "test_a_folder_of_another_run",
}
"""Mistakes that need more than a recipe: a folder, a port, a small disk -> the test in test_checks.py that makes them."""


def write_files(folder):
    for name, records in FILES.items():
        (folder / name).write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))


def page():
    count = sum(map(len, KINDS.values())) + len(ELSEWHERE)
    lines = [
        "# What `opd check` finds",
        "",
        f"Generated from `tests/preflight/mistakes.py` by `python -m tests.preflight.mistakes`: {count} kinds of mistakes, each made by a",
        "test, which looks for the sentence. Errors stop a run before it starts, with exit status 2; warnings and notes do not. A recipe that cannot",
        "even be read is refused with what is wrong in it as a file.",
        "",
    ]
    for subject, mistakes in KINDS.items():
        lines += [f"## {subject}", "", "| mistake | for example | a part of what is said |", "|---|---|---|"]
        for name, (_, changes, said) in mistakes.items():
            shown = " ".join(f"`{key}={value if isinstance(value, str) else json.dumps(value)}`" for key, value in changes.items())
            lines.append(f"| {name} | {shown} | {said} |".replace("||", "| |"))
        lines.append("")
    lines += ["## Which need more than a recipe", "", *(f"- {mistake}" for mistake in ELSEWHERE), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
