"""Freeze a step of a run into a bundle, and do it again from there: the same update bit by bit, or another objective on the same rollouts.

Legend: T completion tokens of an answer, D hidden size, K ids of a token.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from opd_kernels import HeadView, selected_logprobs, topk_logprobs
from opd_rollout.types import TokenScores
from torch import Tensor

from opd.api import make_system
from opd.build import pretrained
from opd.build.devices import recorded_chunk_bytes
from opd.build.system import Parts, add_adapters, average_of, build_parts, check_support_sizes, input_facts, make_learner, objective_of, parse_weights
from opd.config.load import load_recipe, parse_overrides, parse_recipe
from opd.config.recipe import Recipe
from opd.errors import NotReproduced
from opd.learner.types import Learner
from opd.loop import System, train_step
from opd.objective import Objective, SignalNeeds, join
from opd.randomness import seed_generators
from opd.replaying.bundle import Bundle, Outcome, read_bundle, weights_name, write_bundle
from opd.replaying.freezing import HIDDEN_MEBIBYTES, Recorder, bundle_path
from opd.run.folder import INPUTS, checkpoint_step, checkpoints, read_lines
from opd.run.live import PhaseClock, Status, StopRequest
from opd.run.machine import environment
from opd.run.named import find_bundle, find_run
from opd.run.training import read_checkpoint
from opd.teacher.score import joined_ids
from opd.types import Judged, Meter, Prepared, Sample

MAY_CHANGE = ("method", "objective", "updates", "optimizer.lr", "optimizer.clip", "learner.token_budget", "learner.packed", "learner.chunk_bytes")
"""Keys that a replay may set: all others decide the rollouts and scores, which a bundle holds fixed."""

SHOWN = ("loss/", "gradient_norm", "entropy/", "gap/", "tokens/learner", "seconds/learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A replay beside the record. same_objective: nothing was overridden; reproduced: then, whether loss and weights are equal bit by bit."""

    bundle: Bundle
    outcome: Outcome
    same_objective: bool
    reproduced: bool


def freeze(run: str | Path, step: int, *, weights: bool = True, verifier: Callable[..., Any] | None = None) -> Path:
    """Write RUN/bundles/step-N.safetensors and return its path. The run's folder is only read besides.

    The step is done again from the newest checkpoint before it (from the start where there is none) and compared with the run's metrics.
    weights: false leaves weights and optimiser out, and keeps their name. verifier: the one the run was given from Python.
    Raises ValueError for a step the run has not done, and where data, model or verifier are no longer the run's.
    """
    folder = find_run(run)
    recipe, resolved = run_recipe(folder)
    rows = {row["step"]: row for row in read_lines(folder / "metrics.jsonl")}
    if step not in rows:
        raise ValueError(f"{folder} has no step {step}; its metrics.jsonl has {f'steps 1 to {max(rows)}' if rows else 'none'}")
    if recipe.learner.ranks * recipe.launch.nodes > 1:
        raise ValueError(f"{folder} ran with several ranks; a step is bundled in one process, whose batches differ: only runs of one rank can be")
    seed_generators(recipe.seed)
    parts = build_parts(recipe, verifier=verifier)
    check_inputs(folder, resolved, recipe, parts)
    with tempfile.TemporaryDirectory() as scratch:
        system = make_system(parts, PhaseClock(Status(Path(scratch) / "status.json", recipe.steps), StopRequest()))
        rerun(folder, system, step - 1)
        recorder = Recorder(parts, system.last, weights=weights, wanted=lambda: True)
        report, samples = train_step(step - 1, replace(system, teachers=recorder))
        row = rows[step]
        equal = all(row.get(name) == report.meters[name].mean for name in ("loss/total", "gradient_norm") if name in report.meters)
        bundle = recorder.bundle(folder.name, recipe, report, samples, equals_run=equal)
    parts.learner.close()
    path = bundle_path(folder, step)
    write_bundle(path, bundle)
    return path


def run_recipe(folder: Path) -> tuple[Recipe, Mapping[str, Any]]:
    """(recipe, the whole of resolved.json) of a run. Raises ValueError for a folder that is no run."""
    path = folder / "resolved.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder (it has no resolved.json); `opd show` lists the runs here")
    resolved = json.loads(path.read_text(encoding="utf-8"))
    if staleness := resolved["recipe"].get("asynchrony", {}).get("max_staleness"):
        raise ValueError(
            f"{folder} is asynchronous (asynchrony.max_staleness={staleness}): its answers were written beside other steps, so a step cannot be done "
            "again alone; train with asynchrony.max_staleness=0 to make bundles"
        )
    overrides = {"learner.kind": resolved.get("learner", "auto"), "track.wandb": "disabled", "engine.kind": "torch", "engine.replicas": 1}
    if chunk_bytes := recorded_chunk_bytes(resolved):
        overrides["learner.chunk_bytes"] = chunk_bytes
    return parse_recipe(resolved["recipe"], overrides, origin=str(path), resolved=True), resolved


def check_inputs(folder: Path, resolved: Mapping[str, Any], recipe: Recipe, parts: Parts) -> None:
    """Raises ValueError where a rerun would not start from what the run started from."""
    found = input_facts(recipe, parts.tokenizer)
    verify = parts.problems.verify
    found["verifier"] = getattr(verify, "__qualname__", type(verify).__name__)
    for key, what in {**INPUTS, "verifier": "the verifier"}.items():
        if key in resolved and resolved[key] != found[key]:
            raise ValueError(
                f"{folder} cannot be done again: {what} is not the run's ({key}: {resolved[key]} -> {found[key]}). Put it back"
                + ("; a verifier given from Python is given again: opd.replaying.replay.freeze(run, step, verifier=fn)" if key == "verifier" else "")
            )


def rerun(folder: Path, system: System, step: int) -> None:
    """Bring the system to where the run was after `step`: the newest checkpoint up to there, then the steps between, in memory only."""
    found = [path for path in checkpoints(folder) if checkpoint_step(path) <= step]
    start = checkpoint_step(found[-1]) if found else 0
    if found:
        read_checkpoint(found[-1], system)
    dev = {row["step"]: row["avg@k"] for row in read_lines(folder / "eval.jsonl") if row["split"] == "dev" and row["avg@k"] is not None}
    for current in range(start, step + 1):
        if current > start:
            train_step(current - 1, system)
        if current in dev:
            system.last["eval/dev"] = dev[current]  # schedules may read it


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The part of a tokenizer that a learner needs."""

    size: int
    pad_token_id: int
    eos_token_id: int | None = None

    def __len__(self) -> int:
        return self.size


def replay(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Replayed:
    """The bundle's step once more, in the torch learner; without overrides bit by bit, else under another objective or update.

    Raises ValueError for overrides that would change the rollouts, and for an objective that needs scores the bundle does not hold.
    """
    bundle, changes = read_bundle(find_bundle(path)), parse_overrides(overrides)
    if not bundle.learner:
        raise ValueError(f"{path} was made without weights (weights=false): it can be read, not replayed; make it again with weights=true")
    recipe = replayed_recipe(bundle, changes)
    torch.set_num_threads(bundle.threads)
    learner = rebuilt_learner(bundle, recipe)
    objective, samples, heads = objective_of(recipe).at(bundle.step - 1, bundle.last), bundle.samples, bundle.heads
    check_support_sizes(objective, bundle.vocab_size)
    if recipe.objective != parse_recipe(dict(bundle.recipe), resolved=True).objective:
        samples = rescored(bundle, objective, learner)
    report = learner.step(list(samples), objective, heads)
    named = dict(learner.policy.model.named_parameters())
    outcome = Outcome(meters={**_step_meters(bundle), **report.meters}, skipped=report.skipped, weights=weights_name(named))
    same = outcome.weights == bundle.outcome.weights and all(
        outcome.meters[name] == meter for name, meter in bundle.outcome.meters.items() if name.startswith("loss/")
    )
    return Replayed(bundle=bundle, outcome=outcome, same_objective=not changes, reproduced=same)


def _step_meters(bundle: Bundle) -> Mapping[str, Meter]:
    return {name: meter for name, meter in bundle.outcome.meters.items() if name.startswith(("reward/", "length/", "accuracy/", "tokens/"))}


def replayed_recipe(bundle: Bundle, changes: Mapping[str, Any]) -> Recipe:
    """The bundle's recipe under the overrides. Raises ValueError for keys that a replay cannot change."""
    for key in changes:
        if not key.startswith(MAY_CHANGE):
            raise ValueError(f"{key}: a replay keeps the rollouts and scores of its bundle; it may change {', '.join(MAY_CHANGE)}")
    changes, raw = dict(changes), dict(bundle.recipe)
    if method := changes.pop("method", ""):
        chosen = load_recipe(str(method)).model_dump(mode="json")
        raw |= {"objective": chosen["objective"], "updates": chosen["updates"], "method": method}
    return parse_recipe(raw, {**changes, "learner.kind": "torch", "learner.zero_stage": 0}, origin="replay", resolved=True)


def rebuilt_learner(bundle: Bundle, recipe: Recipe) -> Any:
    """The torch learner as it was before the step. Raises AssertionError unless its weights have the bundle's name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(bundle.config, encoding="utf-8")
        config = pretrained.load_config(folder)
    model = pretrained.new_model(config, recipe.seed, dtype=getattr(torch, recipe.model.dtype), attn_implementation=recipe.model.attention)
    if recipe.model.lora:
        add_adapters(model, recipe)
    average = average_of({name: parse_weights(name, signal.weights) for name, signal in recipe.signals.items()})
    learner: Any = make_learner(recipe, model, Vocabulary(size=bundle.vocab_size, pad_token_id=bundle.pad_id), average)  # type: ignore[arg-type]
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in bundle.frozen.items():
            own[name].copy_(tensor)
    learner.load_state({**bundle.learner, "token_budget": recipe.learner.token_budget})
    assert weights_name(own) == bundle.before, "the bundle's tensors do not make the weights that it names"
    return learner


def rescored(bundle: Bundle, objective: Objective, learner: Learner) -> list[Sample]:
    """The bundle's answers joined for another objective, with the scores that it needs."""
    judged = [sample.judged for sample in bundle.samples]
    prepared = learner.prepare(judged, objective.needs)
    scores: list[dict[str, TokenScores]] = [{} for _ in judged]
    temperature = float(bundle.recipe["sampling"]["temperature"])
    joint = [_joint(bundle, objective, n, prepared[n], temperature) for n in range(len(judged))]
    for name, need in objective.needs.signals.items():
        known = any(name in sample.scores for sample in bundle.samples)
        if not known and name not in bundle.hidden:
            held = sorted({*bundle.hidden, *(held for sample in bundle.samples for held in sample.scores)})
            raise ValueError(f"the objective reads signal {name!r}, of which the bundle holds no scores; it holds {', '.join(held) or 'none'}")
        for n, sample in enumerate(bundle.samples):
            hidden = bundle.hidden[name][n] if name in bundle.hidden else None
            if hidden is not None:
                asked = replace(need, union=0, student_support=True) if need.union else need
                ready = replace(prepared[n], topk_ids=joint[n]) if need.union and prepared[n] else prepared[n]
                scores[n][name] = scores_from(hidden, bundle.heads[name], sample.judged, asked, ready, temperature)
            elif name in sample.scores:
                if need.k or need.student_support or need.union or need.hidden:
                    raise ValueError(
                        f"the objective needs more of signal {name!r} than its sampled tokens, and the bundle was made without the teachers' "
                        f"hidden states (they exceed {HIDDEN_MEBIBYTES} MiB): replay objectives on support sampled"
                    )
                scores[n][name] = sample.scores[name]
    return join(judged, prepared, scores, objective, views=bundle.views)


def _joint(bundle: Bundle, objective: Objective, n: int, prepared: Prepared | None, temperature: float) -> Tensor | None:
    """The ids of the support "union" of an answer [T, K], None where no term has one."""
    asked = {name: need.union for name, need in objective.needs.signals.items() if need.union and bundle.hidden.get(name)}
    if not asked or prepared is None or prepared.topk_ids is None:
        return None
    parts, judged = [prepared.topk_ids], bundle.samples[n].judged
    for name, k in asked.items():
        if (hidden := bundle.hidden[name][n]) is not None:
            parts.append(scores_from(hidden, bundle.heads[name], judged, SignalNeeds(k=k), None, temperature).ids[:, 1:])
    return joined_ids(parts)


def scores_from(
    hidden_TD: Tensor, head: HeadView, judged: Judged, need: SignalNeeds, prepared: Prepared | None, temperature: float
) -> TokenScores:
    """What a scorer with this head would have answered, from its hidden states."""
    token_T = torch.tensor(judged.completion.token_ids)
    options: dict[str, Any] = {"temperature": temperature, **head.keywords()}
    found: Any
    if need.student_support:
        assert prepared is not None and prepared.topk_ids is not None
        support_TK = prepared.topk_ids
        found = selected_logprobs(hidden_TD, head.weight, torch.cat([token_T[:, None], support_TK], 1), **options)
        outside = found.logp[:, 0].masked_fill((support_TK == token_T[:, None]).any(1), float("-inf"))
        columns = {"ids": support_TK, "logp": found.logp[:, 1:], "tail_logp": torch.logaddexp(found.tail_logp, outside)}
    elif need.k:
        found = topk_logprobs(hidden_TD, head.weight, need.k, always_include=token_T, **options)
        columns = {"ids": found.ids, "logp": found.logp, "tail_logp": found.tail_logp}
    else:
        found = selected_logprobs(hidden_TD, head.weight, token_T[:, None], **options)
        columns = {"ids": token_T[:, None], "logp": found.logp, "tail_logp": found.tail_logp}
    return TokenScores(
        sampled=found.logp[:, 0], entropy=found.entropy, hidden=hidden_TD if need.hidden else None, temperature=temperature, version=0,
        view_hash="", **columns,
    )  # fmt: skip


def describe(result: Replayed) -> str:
    """Record and replay side by side, and the verdict."""
    before, now = result.bundle.outcome, result.outcome
    tokens = sum(len(sample.judged.completion.token_ids) for sample in result.bundle.samples)
    lines = [f"{result.bundle.run}, step {result.bundle.step}: {len(result.bundle.samples)} answers, {tokens} tokens"]
    lines.append(f"{'':<28}{'recorded':>18}{'replayed':>18}")
    names = sorted({name for outcome in (before, now) for name in outcome.meters if name.startswith(SHOWN)})
    for name in names:
        cells = [f"{outcome.meters[name].mean:.6g}" if name in outcome.meters else "-" for outcome in (before, now)]
        lines.append(f"{name:<28}{cells[0]:>18}{cells[1]:>18}")
    lines.append(f"{'weights after':<28}{before.weights[:12]:>18}{now.weights[:12]:>18}")
    if now.skipped:
        lines.append(f"no update was applied: {now.skipped}")
    if result.same_objective:
        lines.append("equal bit by bit: losses and weights" if result.reproduced else f"NOT equal: {_why(result.bundle)}")
    return "\n".join(lines)


def _why(bundle: Bundle) -> str:
    here = environment()["packages"]
    changed = [f"{name} {was} -> {here.get(name, 'missing')}" for name, was in bundle.packages.items() if here.get(name) != was]
    return f"other packages ({', '.join(changed)})" if changed else f"same packages; another processor, or code ({os.uname().machine})"


def bundle(run: str, options: Mapping[str, Any]) -> str:
    """`opd bundle`: writes the bundle and says where, how large, and whether the step came out as in the run."""
    if unknown := sorted(set(options) - {"step", "weights"}):
        raise ValueError(f"opd bundle RUN step=N [weights=false]: unknown option {unknown[0]!r}")
    step, weights = options.get("step"), options.get("weights", True)
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"opd bundle needs the number of a step that the run has done, e.g. step=12 (found {step!r})")
    if not isinstance(weights, bool):
        raise ValueError(f"weights is {weights!r}; write weights=true (the default) or weights=false")
    path = freeze(run, step, weights=weights)
    equal = "the step came out as in the run" if read_bundle(path).equals_run else "NOTE: done again, the step differs from the run's metrics.jsonl"
    return f"{path} ({path.stat().st_size / 2**20:.1f} MiB); {equal}"


def replay_and_report(path: str, overrides: Mapping[str, Any]) -> str:
    """`opd replay`: the comparison as text. Raises NotReproduced where the recorded objective gave other bits."""
    result = replay(path, overrides)
    text = describe(result)
    if result.same_objective and not result.reproduced:
        raise NotReproduced(text)
    return text
