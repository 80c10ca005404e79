"""`profile.steps=3`: tokens and model FLOPs a second by role over some steps of a run, then a trace of the step after them.

The figures are of steps without the tracer, which slows small steps much; the first step of a start, which compiles and allocates, is left out.
"""

import gzip
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from opd_rollout.types import ScoreRequest, TokenScores
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from opd.build import pretrained
from opd.build.spending import num_devices
from opd.build.student import config_at, student_config, student_path
from opd.build.system import Parts, parse_weights
from opd.build.views import OTHERS
from opd.config.recipe import Recipe
from opd.launcher.ranks import Ranks
from opd.preflight.memory import products
from opd.run.folder import write_json
from opd.run.spending import ROLE_PHASES, role_seconds
from opd.source import DATASET
from opd.teacher.score import Weights
from opd.timing.flops import Products, forward, generation, training
from opd.types import Sample, StepReport

FOLDER, FIGURES, TRACE = "profile", "profile.json", "trace.json.gz"
WARM_UP, TRACED = 1, 1  # steps before and after those that are measured
TOKENS = {"student": "tokens/student", "teacher": "tokens/teacher", "learner": "tokens/learner"}
PEAKS = {
    ("A100", "bfloat16"): 312e12, ("A100", "float32"): 19.5e12,
    ("H100", "bfloat16"): 989e12, ("H100", "float32"): 67e12,
    ("H200", "bfloat16"): 989e12, ("H200", "float32"): 67e12,
    ("L40S", "bfloat16"): 362e12, ("L40S", "float32"): 91.6e12,
}  # fmt: skip
"""Dense products without sparsity that the maker states for the SXM cards (and the L40S), FLOP a second; float32 without TF32."""


class Profile:
    """Counts a run's tokens and FLOPs step by step and traces one step; the run calls `around` for every phase and `step` after every step.

    Every rank has one, and they exchange their counts; the one that leads traces its own process and writes.
    """

    def __init__(self, folder: Path, recipe: Recipe, parts: Parts, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Raises ValueError where the machine's GPU cannot be traced."""
        self._folder, self._recipe, self._ranks, self._say = folder / FOLDER, recipe, ranks, say
        self._activities = activities()
        self._models, self._why = models_of(recipe, parts)
        self._seen, self._steps, self._spent = 0, [], Counter[str]()
        self._scored: dict[str, int] = defaultdict(int)
        self._armed, self._tracer = False, None
        for name, weights in parts.scorer.weights.items():
            parts.scorer.weights[name] = replace(weights, scores=partial(self._score, name, weights))

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        """A phase of the step, by name in the trace; the traced step begins with its first."""
        if self._armed and self._tracer is None and phase == "rollout":
            self._tracer = profile(activities=self._activities)
            self._tracer.start()
        with record_function(f"opd/{phase}"):
            yield

    def step(self, report: StepReport, samples: Sequence[Sample]) -> None:
        """What the last step did; collective."""
        self._seen += 1
        scored, self._scored = dict(self._scored), defaultdict(int)
        if self._tracer is not None:
            self._finish(report)
        elif WARM_UP < self._seen <= WARM_UP + self._recipe.profile.steps:
            self._steps.append(report.step + 1)
            self._spent.update(self._counted(report, samples, scored))
            self._armed = len(self._steps) == self._recipe.profile.steps and self._ranks.leads

    def close(self) -> None:
        """Ends a trace that was broken off; says what a run that ended early lacks."""
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer = None
        if self._armed or (self._seen and len(self._steps) < self._recipe.profile.steps):
            needed = WARM_UP + self._recipe.profile.steps + TRACED
            self._say(f"profile: not written, the run did {self._seen} of the {needed} steps that it needs")

    def _score(self, name: str, weights: Weights, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        if name in self._models:
            lengths = [(len(one.context_ids) + len(one.completion_ids), len(one.completion_ids)) for one in requests]
            self._scored[name] += sum(forward(self._models[name], *length) for length in lengths)
        return weights.scores(requests)

    def _counted(self, report: StepReport, samples: Sequence[Sample], scored: Mapping[str, int]) -> Counter[str]:
        """Tokens, seconds and FLOPs of one step, by role, over all ranks."""
        found = Counter({f"seconds/{role}": busy for role, busy in role_seconds(report.seconds).items()})
        found["seconds/learn"] = report.seconds.get("learn", 0.0)
        found["seconds/step"] = sum(value for phase, value in report.seconds.items() if "/" not in phase)
        found.update({f"tokens/{role}": report.meters[name].sum for role, name in TOKENS.items() if name in report.meters})
        own = Counter({"flops/teacher": sum(scored.values())})
        if student := self._models.get(""):
            lengths = [(len(one.judged.prompt_ids), len(one.judged.completion.token_ids)) for one in samples]
            own["flops/learner"] = self._recipe.updates.epochs * sum(training(student, prompt + answer, answer) for prompt, answer in lengths)
            own["flops/student"] = sum(generation(student, *group) for group in answered(samples))
            own["seen"] = sum(sum(answers) for _, answers in answered(samples))
        for other in self._ranks.gather(own):
            found.update(other)
        if seen := found.pop("seen", 0):  # answers that a filter dropped were written too, those of earlier steps were not
            found["flops/student"] *= found["tokens/student"] / seen
        return found

    def _finish(self, report: StepReport) -> None:
        assert self._tracer is not None
        tracer, self._tracer, self._armed = self._tracer, None, False
        tracer.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        plain, packed = self._folder / TRACE.removesuffix(".gz"), self._folder / TRACE
        tracer.export_chrome_trace(str(plain))
        with plain.open("rb") as whole, gzip.open(packed, "wb", compresslevel=3) as small:
            shutil.copyfileobj(whole, small)
        plain.unlink()
        peak, source = peak_flops(self._recipe)
        traced = sum(value for phase, value in report.seconds.items() if "/" not in phase)
        figures = figures_of(self._spent, self._steps, peak * num_devices(self._recipe), self._why)
        figures |= {"peak_flops": peak, "peak_from": source, "devices": num_devices(self._recipe)}
        figures |= {"trace": f"{FOLDER}/{TRACE}", "traced_step": report.step + 1, "traced_seconds": traced}
        write_json(self._folder / FIGURES, figures)
        for line in described(figures):
            self._say(f"profile: {line}")


def answered(samples: Sequence[Sample]) -> list[tuple[int, list[int]]]:
    """(tokens of the prompt, tokens of each answer that was drawn) of every group."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for one in samples:
        if one.judged.completion.source != DATASET and not one.context:
            groups[one.judged.group, one.judged.prompt_ids].append(len(one.judged.completion.token_ids))
    return [(len(ids), answers) for (_, ids), answers in groups.items()]


def activities() -> list[ProfilerActivity]:
    """What can be traced here. Raises ValueError for a GPU that this build of torch cannot trace."""
    if not torch.cuda.is_available():
        return [ProfilerActivity.CPU]
    if ProfilerActivity.CUDA not in supported_activities():
        raise ValueError(
            "profile.steps: this build of torch cannot trace the GPU (Kineto has no CUPTI): install torch's own wheel, or profile.steps=0"
        )
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def models_of(recipe: Recipe, parts: Parts) -> tuple[dict[str, Products], dict[str, str]]:
    """(products of the student, under "", and of the teachers that work here, by signal; role -> why its FLOPs are not counted)."""
    rank = recipe.model.lora.rank if recipe.model.lora else 0
    config = student_config(recipe, student_path(recipe), parts.tokenizer)
    found, why = {}, {}
    try:
        found[""] = products(config, lora_rank=rank)
        for name, signal in recipe.signals.items():
            kind, path = parse_weights(name, signal.weights)
            if kind == "served" or signal.scores:
                why["teacher"] = f"signals.{name} is {'served by vLLM' if kind == 'served' else 'read from a file, in part or whole'}"
                continue
            found[name] = products(config_at(recipe, pretrained.find_model(path))) if kind in OTHERS else found[""]
    except ValueError as error:
        return {}, dict.fromkeys(TOKENS, str(error))
    if recipe.engine.kind != "torch":
        why["student"] = f"engine={recipe.engine.kind} answers in processes of its own, which this one does not time"
    return found, why


def peak_flops(recipe: Recipe) -> tuple[float, str]:
    """(FLOP a second of one device, where the number is from); 0 for a GPU that is not known."""
    if recipe.profile.peak_tflops:
        return recipe.profile.peak_tflops * 1e12, "profile.peak_tflops"
    dtype = recipe.model.dtype
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        known = [peak for (name, kind), peak in PEAKS.items() if name in card and kind == dtype and "PCIe" not in card]
        return (known[0], f"{card}, {dtype}, as its maker states") if known else (0.0, f"{card} is not known: give profile.peak_tflops")
    return measured_product(getattr(torch, dtype)), f"a product of 1,024 x 1,024 {dtype} matrices here, {torch.get_num_threads()} threads"


def measured_product(dtype: torch.dtype, seconds: float = 0.5, size: int = 1024) -> float:
    """FLOP a second of this process's fastest product of square matrices in that time."""
    a, best, ends = torch.randn(size, size).to(dtype), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def figures_of(spent: Mapping[str, float], steps: Sequence[int], peak: float, why: Mapping[str, str]) -> dict[str, Any]:
    """What profile.json holds, from sums over the steps: by role and for the whole step, null (with a reason) where it cannot be known."""
    roles = {}
    for role in TOKENS:
        seconds, tokens, flops = (float(spent[f"{kind}/{role}"]) for kind in ("seconds", "tokens", "flops"))
        known = role not in why and seconds > 0
        roles[role] = {
            "tokens": tokens, "seconds": seconds, "phases": list(ROLE_PHASES[role]),
            "tokens_per_second": tokens / seconds if seconds else None,
            "flops": flops if role not in why else None,
            "mfu": flops / seconds / peak if known and peak else None,
            "why": why.get(role, "" if peak else "the device's peak is not known"),
        }  # fmt: skip
    step, learn = float(spent["seconds/step"]), float(spent["seconds/learn"])
    whole = sum(float(spent[f"flops/{role}"]) for role in TOKENS)
    if learn and roles["learner"]["mfu"] is not None:  # the update alone: preparing and joining samples are no products of it
        roles["learner"] |= {"mfu": spent["flops/learner"] / learn / peak, "seconds_of_mfu": learn}
    return {"steps": list(steps), "seconds_per_step": step / len(steps), "roles": roles, "mfu": None if why or not peak else whole / step / peak}


def described(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines for a terminal."""
    lines = [f"steps {figures['steps'][0]} to {figures['steps'][-1]}, {figures['seconds_per_step']:.3g} s each, without the tracer"]
    for role, one in figures["roles"].items():
        if one["tokens"]:
            used = f"MFU {one['mfu']:.1%}" if one["mfu"] is not None else f"no MFU: {one['why']}"
            lines.append(f"{role}: {one['tokens_per_second']:,.0f} tokens/s, {used}")
    if figures["mfu"] is not None:
        lines.append(f"whole step: MFU {figures['mfu']:.1%} of {figures['peak_flops'] / 1e12:.3g} TFLOP/s ({figures['peak_from']})")
    slower = figures["traced_seconds"] / figures["seconds_per_step"]
    return [*lines, f"{figures['trace']} is step {figures['traced_step']} ({slower:.1f} times as long under the tracer); open it in Perfetto"]
