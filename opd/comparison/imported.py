"""`opd import`: runs that TRL or another trainer made become run folders that `opd compare` and `opd diff` read. See docs/comparing.md."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from opd.accuracy import EvalResult, decoding_name, summarise, write_evaluation
from opd.comparison.foreign import read_rows, read_trainer_state
from opd.config.choices import nearest
from opd.config.load import read_yaml
from opd.run.folder import append_line, write_json

NAMES: Mapping[str, str] = {  # theirs, "train/" taken off, -> ours; TRL, then verl
    "loss": "loss/total",
    "reward": "reward/mean",
    "completions/mean_length": "length/mean",
    "completions/clipped_ratio": "length/truncated",
    "entropy": "entropy/student",
    "grad_norm": "gradient_norm",
    "step_time": "seconds/step",
    "num_tokens": "tokens/learner",
    "critic/rewards/mean": "reward/mean",
    "response_length/mean": "length/mean",
    "response_length/clip_ratio": "length/truncated",
    "actor/entropy": "entropy/student",
    "actor/pg_loss": "loss/total",
    "actor/grad_norm": "gradient_norm",
    "timing_s/step": "seconds/step",
}
ACCURACIES = ("eval/dev", "eval_accuracy", "eval/accuracy", "eval_reward", "eval/reward")
TRAINED = {"loss/total", "length/mean", "seconds/step", "tokens/student", "reward/mean"}  # a row with one of these is of a training step
PLACES = ("step", "_step", "Step", "global_step", "_timestamp")
COUNTERS = ("tokens/student", "tokens/teacher", "tokens/learner", "seconds/total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the files do not say. completions: answers a step; accuracy: key of the dev accuracy; generations, greedy: judged test answers (JSONL);
    seconds: training time where no step times are logged; names: their metric -> ours; config: JSON or YAML of settings to record."""

    name: str
    seed: int = 0
    completions: int = 0
    accuracy: str = ""
    generations: str = ""
    greedy: str = ""
    suite: str = "test"
    seconds: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    model: str = ""


def import_run(kind: str, source: str, given: Mapping[str, Any], root: Path = Path("runs")) -> Path:
    """Write root/<name> from a TRL output folder ("trl") or a W&B export ("wandb": .csv, .json, .jsonl or .wandb); returns the folder.

    Raises ValueError with the fix for a source or an option that does not fit, before anything is written.
    """
    options = _options(kind, given)
    folder = root / options.name
    if folder.exists():
        raise ValueError(f"{folder} exists: give another name=..., or delete it")
    settings: dict[str, Any] = read_yaml(Path(options.config)) if options.config else {}
    if kind == "trl":
        rows, facts, why = read_trainer_state(Path(source))
    elif Path(source).suffix == ".wandb":
        run = import_module("opd.run.offline").read_offline(Path(source))
        rows, facts, why = list(run.history), {"framework": "W&B export"}, ""
        settings = {**run.config, **settings}
    else:
        rows, facts, why = read_rows(Path(source)), {"framework": "W&B export"}, ""
    steps = merged(rows, options.names)
    dev = dev_accuracies(steps, options.accuracy)
    counted = with_counters(steps, options)
    tests = [read_generations(Path(path), 0.0 if greedy else 1.0) for path, greedy in ((options.generations, False), (options.greedy, True)) if path]
    folder.mkdir(parents=True)
    recipe = {"seed": options.seed, "name": options.name, "settings": settings, **({"model": {"path": options.model}} if options.model else {})}
    write_json(folder / "resolved.json", {"schema_version": 1, "recipe": recipe, "source": source, **facts})
    for row in counted:
        append_line(folder / "metrics.jsonl", row)
    for step, accuracy in dev:
        row = {"step": step, "suite": options.suite, "split": "dev", "decoding": decoding_name(1.0), "temperature": 1.0, "avg@k": accuracy}
        append_line(folder / "eval.jsonl", row)
    for temperature, lines, k in tests:
        _write_test(folder, options.suite, counted[-1]["step"], temperature, lines, k)
    state, last = "preempted" if why else "finished", counted[-1]["step"]
    write_json(folder / "status.json", {"state": state, "step": last, "steps": last, "why": why or f"imported from {source}"})
    return folder


def _options(kind: str, given: Mapping[str, Any]) -> Options:
    known = list(Options.__dataclass_fields__)
    if kind not in ("trl", "wandb"):
        raise ValueError(f"opd import knows trl and wandb, not {kind!r}{nearest(kind, ['trl', 'wandb'])}")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"opd import: unknown option {unknown[0]!r}{nearest(unknown[0], known)}; options: {', '.join(known)}")
    name = given.get("name", "")
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("opd import needs name=..., the folder under runs/, e.g. name=trl-grpo/seed-0")
    for key, types in (("seed", (int,)), ("completions", (int, float)), ("seconds", (int, float)), ("names", (Mapping,))):
        if key in given and not (isinstance(given[key], types) and (key == "names" or given[key] >= 0)):
            raise ValueError(f"opd import: {key} must be {'a mapping {theirs: ours}' if key == 'names' else 'a number from 0'}, found {given[key]!r}")
    return Options(**given)


def merged(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[int, dict[str, float]]:
    """Step -> the numbers that were logged at it, under our names where they have one. Raises ValueError without a step."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        step = next((row[key] for key in ("train/global_step", "step", "_step", "Step", "global_step") if _is_number(row.get(key))), None)
        if step is None:
            raise ValueError(f"a row has no step (step, _step, Step or train/global_step): {dict(list(row.items())[:4])}")
        numbers = {}
        for key, value in row.items():
            if _is_number(value):
                bare = key.removeprefix("train/")
                numbers[names.get(key) or names.get(bare) or NAMES.get(bare, bare)] = float(value)
        steps.setdefault(int(step), {}).update(numbers)
    if not steps:
        raise ValueError("the export holds no row: nothing to import")
    return dict(sorted(steps.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dev_accuracies(steps: Mapping[int, Mapping[str, float]], key: str) -> list[tuple[int, float]]:
    """(step, accuracy) of every evaluation. Raises ValueError where the key is missing or holds no shares."""
    present = {name for numbers in steps.values() for name in numbers}
    chosen = key or next((name for name in ACCURACIES if name in present), "")
    if key and key not in present:
        near = sorted(name for name in present if "eval" in name or "val" in name.split("/")[0])[:8]
        raise ValueError(f"accuracy={key}: no such metric{nearest(key, sorted(present))}; evaluation metrics: {', '.join(near) or 'none'}")
    found = [(step, numbers[chosen]) for step, numbers in steps.items() if chosen in numbers]
    if outside := [value for _, value in found if not 0 <= value <= 1]:
        raise ValueError(f"{chosen} is no accuracy (it holds {outside[0]:g}); name one between 0 and 1 with accuracy=KEY")
    return found


def with_counters(steps: Mapping[int, Mapping[str, float]], options: Options) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: our names, and cumulative tokens and seconds. Raises ValueError where a cost can be had from nothing."""
    present = {name for numbers in steps.values() for name in numbers}
    if "tokens/student" not in present and "length/mean" in present and not options.completions:
        raise ValueError(
            "how many tokens were generated is not logged: give completions=N, the answers a step (TRL: per_device_train_batch_size x "
            "gradient_accumulation_steps x processes)"
        )
    if not present & {"seconds/total", "seconds/step", "_runtime", "train_runtime"} and not options.seconds:
        raise ValueError("no training time is logged (step_time, train_runtime, _runtime): give seconds=TOTAL")
    totals, before, last = dict.fromkeys(COUNTERS, 0.0), 0, max(steps)
    knots = [(0, dict(totals))]  # at steps that trained; evaluations lie between them
    runtime = next((numbers["train_runtime"] for numbers in steps.values() if "train_runtime" in numbers), options.seconds)
    for step, numbers in steps.items():
        if step == 0 or not numbers.keys() & TRAINED:
            continue
        stretch = step - before  # what is logged every n steps stands for all of them
        totals["tokens/student"] += options.completions * numbers.get("length/mean", 0.0) * stretch
        if "seconds/step" in present:
            totals["seconds/total"] += numbers.get("seconds/step", 0.0) * stretch
        else:
            totals["seconds/total"] = numbers.get("_runtime", totals["seconds/total"]) if "_runtime" in present else runtime * step / last
        totals |= {name: numbers[name] for name in COUNTERS if name in numbers}
        if "tokens/learner" not in present:
            totals["tokens/learner"] = totals["tokens/student"]
        knots.append((step, dict(totals)))
        before = step
    if len(knots) == 1:
        raise ValueError(f"the export holds no training step after 0 (none of {', '.join(sorted(TRAINED))}): nothing was trained")
    at = [step for step, _ in knots]
    counted = {name: np.interp(list(steps), at, [values[name] for _, values in knots]).tolist() for name in COUNTERS}
    return [
        {"step": step, **{k: v for k, v in numbers.items() if k not in PLACES}, **{name: counted[name][n] for name in COUNTERS}}
        for n, (step, numbers) in enumerate(steps.items())
        if step
    ]


def read_generations(path: Path, temperature: float) -> tuple[float, list[dict[str, Any]], int]:
    """(temperature, judged answers, k) from a JSONL file whose lines hold problem and correct, and may hold answer, text, length, finish, domain
    and difficulty. Raises ValueError with the line."""
    lines: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(_jsonl(path), 1):
        missing = [key for key in ("problem", "correct") if key not in line]
        if missing or line["correct"] not in (True, False):
            raise ValueError(f"{path}, line {number}: every answer needs problem (an id) and correct (true or false), found keys {', '.join(line)}")
        problem = str(line["problem"])
        sample = counts.get(problem, 0)
        counts[problem] = sample + 1
        defaults = {"question": "", "text": "", "answer": "", "status": "score", "length": 0, "finish": "stop", "domain": ""}
        lines.append({**defaults, **line, "problem": problem, "sample": sample, "correct": bool(line["correct"])})
    if not lines:
        raise ValueError(f"{path} holds no answer")
    if len(set(counts.values())) > 1:
        few, many = min(counts.values()), max(counts.values())
        raise ValueError(f"{path}: problems have {few} to {many} answers; give every problem the same number")
    return temperature, lines, next(iter(counts.values()))


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: generations and greedy name JSONL files of judged answers")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def _write_test(folder: Path, suite: str, step: int, temperature: float, lines: list[dict[str, Any]], k: int) -> None:
    decoding = decoding_name(temperature)
    row = {"step": step, "suite": suite, "split": "test", "decoding": decoding, "temperature": temperature, **summarise(lines, k)}
    name = f"generations/{suite.replace('/', '-')}-test-{decoding.replace(' ', '-')}-step-{step:06d}.jsonl"
    write_evaluation(folder, EvalResult(row={**row, "generations": name}, generations=tuple(lines)))
