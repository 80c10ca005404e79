"""`opd diff`: every recorded difference between two runs, and which of them can explain a gap in their results. Reads manifests, knows no model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd.run.folder import read_lines
from opd.run.named import find_run
from opd.viewer.difference import first_difference

Effect = Literal["yes", "exam", "noise", "numerics", "no"]

EFFECTS: Mapping[str, str] = {
    "yes": "can explain a gap in results",
    "exam": "changes how results are measured: examine both alike (opd eval) before reading a gap",
    "noise": "noise: another seed, as far from this one as any",
    "numerics": "rounding only, which later draws can amplify: no more than another seed does",
    "no": "cannot explain a gap",
}
KEYS: Mapping[str, Effect] = {  # the longest dotted prefix decides; a key that is not here can explain a gap
    "seed": "noise",
    "name": "no",
    "method": "no",
    "paper": "no",
    "hardware": "no",  # the keys that it set are compared one by one
    "target": "no",
    "schema_version": "no",
    "track": "no",
    "prices": "no",
    "guard": "no",  # what it did is in how the run went
    "checkpoint": "no",
    "checkpoint.best": "exam",
    "eval": "exam",
    "data.eval_path": "exam",
    "data.eval_split": "exam",
    "engine": "numerics",
    "ray": "no",
    "launch": "no",
    "launch.extend": "yes",  # the learning rate fell and rose again
    "learner": "numerics",
    "learner.max_skipped": "yes",
    "model.attention": "numerics",
    "model.gradient_checkpointing": "numerics",
}
FACTS: Mapping[str, tuple[str, Effect]] = {  # key of resolved.json -> what it is, its effect; the longest dotted prefix decides here too
    "data_hash": ("data", "yes"),
    "model_hash": ("starting model or teacher", "yes"),
    "template_hash": ("chat template", "yes"),
    "code_hash": ("source files of opd", "yes"),
    "verifier": ("verifier", "yes"),
    "num_parameters": ("size of the student", "yes"),
    "framework": ("trained by", "yes"),
    "trainer": ("trained by", "yes"),
    "source": ("imported from", "no"),
    "settings": ("settings of the other trainer", "yes"),
    "learner": ("kind of learner", "numerics"),
    "git_commit": ("git commit", "yes"),  # "no" where both know the hash of their source files, which says whether it matters
    "packages": ("package", "numerics"),
    "packages.opd-train": ("package", "no"),
    "packages.math-verify": ("package", "exam"),
    "packages.wandb": ("package", "no"),
    "packages.trl": ("package", "yes"),
    "python": ("Python", "numerics"),
    "hardware": ("hardware", "numerics"),
    "hardware.memory_GiB": ("hardware", "no"),
    "accelerators": ("GPUs", "numerics"),
    "cuda": ("CUDA", "numerics"),
    "threads": ("threads of a process", "numerics"),
    "chunk_bytes": ("bytes of logits held at once", "numerics"),
    "devices": ("devices held", "no"),  # what is paid for
    "created": ("started", "no"),
    "changed_on_resume": ("changed on a resume", "numerics"),
    "extended": ("begun with fewer steps", "numerics"),
}
DERIVED = ("allow", "schema_version", "recipe")  # said by the recipe
SUGAR = ("teacher", "view")  # said by signals.main
NEEDED = ("data_hash", "model_hash", "template_hash", "code_hash", "packages", "hardware")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that two runs do not share. what: "recipe", "package", "hardware" ...; left and right as recorded, None where absent."""

    what: str
    key: str
    left: Any
    right: Any
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """Everything that `opd diff` says. unrecorded: manifest keys that a run lacks, so that they cannot be ruled out. parts: see first_difference."""

    left: Path
    right: Path
    differences: tuple[Difference, ...]
    unrecorded: tuple[tuple[Path, str], ...]
    results: tuple[tuple[str, float, float], ...]
    parts: Mapping[str, Any] | None

    def of(self, effect: Effect) -> tuple[Difference, ...]:
        return tuple(found for found in self.differences if found.effect == effect)


def diff_runs(left: Path, right: Path) -> RunDifference:
    """Two runs' manifests, how they ended, what they measured; by folder or name. Raises ValueError with the fix for one without any."""
    left, right = find_run(left), find_run(right)
    manifests = [_manifest(left), _manifest(right)]
    if left.resolve() == right.resolve():
        raise ValueError(f"{left} and {right} are one folder; name two runs")
    ours, theirs = manifests
    found = [*_recipes(ours.get("recipe", {}), theirs.get("recipe", {})), *_facts(ours, theirs), *_courses(left, right)]
    order = list(EFFECTS)
    known = all((run / "metrics.jsonl").is_file() for run in (left, right))
    return RunDifference(
        left=left,
        right=right,
        differences=tuple(sorted(found, key=lambda difference: order.index(difference.effect))),
        unrecorded=(*_unrecorded(left, ours), *_unrecorded(right, theirs)),
        results=tuple(_results(left, right)),
        parts=first_difference(left, right) if known else None,
    )


def _unrecorded(run: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    yield from ((run, key) for key in NEEDED if key not in manifest)
    if manifest.get("recipe", {}).get("settings", True) == {}:  # imported without its settings
        yield run, "settings"


def _manifest(run: Path) -> dict[str, Any]:
    path = run / "resolved.json"
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): the folder is damaged; give another run") from None
    raise ValueError(f"{run} has no resolved.json: nothing says what was run there; give another run (`opd show` lists them)")


def effect_of_key(dotted: str) -> Effect:
    """What a recipe key can do to results: that of its longest prefix in KEYS, "yes" where it has none."""
    parts = dotted.split(".")
    return next((KEYS[prefix] for n in range(len(parts), 0, -1) if (prefix := ".".join(parts[:n])) in KEYS), "yes")


def _recipes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    hidden = SUGAR if ours.get("signals") or theirs.get("signals") else ()
    if not ours.get("settings") or not theirs.get("settings"):  # one of them is not recorded
        hidden = (*hidden, "settings")
    ours, theirs = ({key: value for key, value in side.items() if key not in hidden} for side in (ours, theirs))
    return [Difference(what="recipe", key=key, left=a, right=b, effect=effect_of_key(key)) for key, a, b in leaves(ours, theirs)]


def leaves(left: Any, right: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, left, right) of every leaf that differs; lists of one length are compared item by item, others whole."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in dict.fromkeys((*left, *right)):
            yield from leaves(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right) and any(isinstance(item, Mapping) for item in left):
        for n, (a, b) in enumerate(zip(left, right, strict=True)):
            yield from leaves(a, b, f"{prefix}.{n}")
    elif left != right:
        yield prefix, left, right


def _facts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*ours, *theirs)):
        if key in DERIVED or ((key in ours) != (key in theirs) and key in NEEDED):
            continue
        for dotted, a, b in leaves(ours.get(key), theirs.get(key), key):
            parts = dotted.split(".")
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            what, effect = next((FACTS[prefix] for prefix in prefixes if prefix in FACTS), (key, "yes"))
            if key == "git_commit" and "code_hash" in ours and "code_hash" in theirs:
                effect = "no"
            yield Difference(what=what, key=dotted.partition(".")[2], left=a, right=b, effect=effect)


def _courses(left: Path, right: Path) -> Iterator[Difference]:
    """How the runs went: a run that stopped early, or that a guard rail rolled back, is not the run that its recipe describes."""
    states, rolled = [], []
    for run in (left, right):
        path = run / "status.json"
        status = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        state = status.get("state", "never started")
        states.append(state if state == "finished" else f"{state} at step {status.get('step', 0)}")
        rolled.append([row["step"] for row in read_lines(run / "guard.jsonl") if row.get("action") == "rolled_back"])
    for key, (a, b) in (("state", states), ("rolled back at steps", rolled)):
        if a != b:
            yield Difference(what="course", key=key, left=a, right=b, effect="yes")


def _results(left: Path, right: Path) -> Iterator[tuple[str, float, float]]:
    """Last result of every kind of evaluation that both runs have; test before dev."""
    last = []
    for run in (left, right):
        rows = read_lines(run / "eval.jsonl")
        last.append({f"{row['suite']} {row['split']}, {row['decoding']}": float(row["avg@k"]) for row in rows if row["avg@k"] is not None})
    for name in sorted(last[0].keys() & last[1].keys(), key=lambda name: (" dev" in name, name)):
        yield name, last[0][name], last[1][name]


def describe(found: RunDifference) -> str:
    """The whole as text: what it means first, then every difference under what it can do, then results."""
    lines = [f"A  {found.left}", f"B  {found.right}", "", verdict(found)]
    for effect, meaning in EFFECTS.items():
        mine = found.of(effect)
        if mine:
            lines += ["", f"{meaning} ({len(mine)})", *(f"  {_line(difference)}" for difference in mine)]
    if found.unrecorded:
        runs = dict.fromkeys(run for run, _ in found.unrecorded)
        lines += ["", "not recorded, so not ruled out"]
        lines += [f"  {'A' if run == found.left else 'B'}: {', '.join(FACTS[key][0] for r, key in found.unrecorded if r == run)}" for run in runs]
    if found.results:
        lines += ["", "results, avg@k in percent"]
        lines += [f"  {name}: {100 * a:.1f} -> {100 * b:.1f} ({100 * (b - a):+.1f})" for name, a, b in found.results]
    if found.parts is not None and found.parts["steps"]:
        step, steps = found.parts["step"], found.parts["steps"]
        first = f"they part at step {step}: {_metrics(found.parts)}" if step is not None else f"equal to the last bit over {steps} shared steps"
        lines += ["", f"metrics: {first}"]
    return "\n".join(lines)


def verdict(found: RunDifference) -> str:
    """One or two sentences: what a gap between these two runs may come from."""
    causes, exam = found.of("yes"), found.of("exam")
    names = list(dict.fromkeys(_name(difference) for difference in causes))
    exams = f" They were also measured differently ({_listed([_name(difference) for difference in exam])})." if exam else ""
    if len(names) > 1:
        text = f"{len(names)} differences can explain a gap ({_listed(names)}): these two runs alone cannot tell which of them did."
    elif names:
        text = f"One difference can explain a gap: {names[0]}."
        text += " The seeds differ as well: one pair of runs cannot tell it from noise." if found.of("noise") else ""
    elif exam:
        return f"Nothing that was learned from differs, but they were measured differently ({_listed([_name(difference) for difference in exam])})."
    elif found.of("noise"):
        return "Nothing but the seed can have made a difference: a gap between these two is noise. Several seeds tell (opd compare)."
    elif found.of("numerics"):
        text = "Only rounding can differ: a gap between these two is no larger than another seed makes."
    else:
        text = "Nothing that is recorded makes a difference: these runs should agree to the last bit."
    return text + exams


def _metrics(parts: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {a:.6g} -> {b:.6g}" for name, a, b in parts["metrics"] if isinstance(a, int | float) and isinstance(b, int | float))
    return shown or ", ".join(name for name, _, _ in parts["metrics"])


def _line(difference: Difference) -> str:
    return f"{_name(difference)}: {_short(difference.left)} -> {_short(difference.right)}"


def _name(difference: Difference) -> str:
    if difference.what == "recipe":
        return difference.key
    return f"{difference.what} {difference.key}".strip()


def _short(value: Any) -> str:
    text = "absent" if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _listed(items: Sequence[str], most: int = 6) -> str:
    shown = [*items[:most], f"{len(items) - most} more"] if len(items) > most else list(items)
    return ", ".join(shown)
