"""Whether the runs of a comparison may be compared: on which code and which data they ran, and how many of them at a time."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opd.comparison.results import RunResult
from opd.comparison.summary import Summary
from opd.comparison.wording import listed
from opd.config.recipe import Data

DIGITS = 12  # of a commit or a hash that is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A box of the page: its heading and its lines."""

    heading: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Runs on the same source files. commits: what was checked out; one commit with changes that nobody committed gives several versions."""

    code: str
    commits: tuple[str, ...]
    runs: tuple[RunResult, ...]

    @property
    def name(self) -> str:
        commits = listed([f"commit {commit[:DIGITS]}" for commit in self.commits])
        files = f"source files {self.code[:DIGITS]}" if self.code not in self.commits else ""
        return f"{commits}, {files}" if commits and files else commits or files


def warnings(summary: Summary) -> list[Warned]:
    """What may make the page's numbers incomparable, most important first; empty where all runs share code and data."""
    found = [_code(summary), _data(summary), _crowd(summary)]
    return [warned for warned in found if warned is not None]


def versions(runs: Iterable[RunResult]) -> list[Version]:
    """Our own runs by the hash of their source files (by commit where that was not recorded), in the order in which versions were first used."""
    held: dict[str, list[RunResult]] = {}
    for run in sorted(ours(runs), key=lambda run: str(run.facts.get("created", ""))):
        code = str(run.facts.get("code_hash") or run.facts.get("git_commit") or "")
        if code:
            held.setdefault(code, []).append(run)
    return [
        Version(code=code, commits=tuple(dict.fromkeys(c for run in mine if (c := str(run.facts.get("git_commit", ""))))), runs=tuple(mine))
        for code, mine in held.items()
    ]


def ours(runs: Iterable[RunResult]) -> list[RunResult]:
    """Runs that this package made: those of another trainer have no such code or hash."""
    return [run for run in runs if run.facts and not run.facts.get("framework")]


def reported(summary: Summary) -> list[RunResult]:
    return [run for arm in summary.arms for run in arm.runs]


def searched(summary: Summary) -> list[RunResult]:
    return [run for arm in summary.arms if arm.tuned is not None for trial in arm.tuned.trials for run in trial.runs]


def named(summary: Summary, runs: Sequence[RunResult]) -> str:
    """Arms with their seeds: "base; GRPO and OPD (seed 0); OPSD (seeds 0 and 1)"."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for arm in summary.arms:
        seeds = tuple(sorted(run.seed for run in runs if run.arm == arm.name))
        if seeds:
            by_seeds.setdefault(seeds if arm.trained else (), []).append(arm.label)
    return "; ".join(listed(labels) + (f" ({_seeds(seeds)})" if seeds else "") for seeds, labels in by_seeds.items())


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}"


def _code(summary: Summary) -> Warned | None:
    found, tried = versions(reported(summary)), versions(searched(summary))
    if len(found) < 2 and len(tried) < 2 and {version.code for version in found} >= {version.code for version in tried}:
        return None
    lines = [f"{version.name}: {named(summary, version.runs)}." for version in found] if len(found) > 1 else []
    trained = {arm.name for arm in summary.arms if arm.trained}
    codes: dict[int, set[str]] = {}
    for version in found:
        for run in version.runs:
            if run.arm in trained:
                codes.setdefault(run.seed, set()).add(version.code)
    mixed = [seed for seed, of_seed in sorted(codes.items()) if len(of_seed) > 1]
    if mixed:
        lines.append(f"Differences are paired by seed, and in {_seeds(mixed)} trained arms ran on different code, which a difference may come from.")
    elif len(found) > 1:
        lines.append("Differences are paired by seed, and within every seed all trained arms ran on the same code.")
    if len(tried) > 1:
        lines.append(f"The search's {sum(len(version.runs) for version in tried)} runs ran on {len(tried)} versions: scores may differ by the code.")
    elif tried and tried[0].code not in {version.code for version in found}:
        lines.append(f"The search ran on another version than the runs: {tried[0].name}.")
    heading = f"Runs of {len(found)} versions of the code" if len(found) > 1 else "The search ran on other code"
    return Warned(heading=heading, lines=tuple(lines))


def data_sections(summary: Summary) -> tuple[dict[str, list[RunResult]], dict[str, list[tuple[Any, str]]]]:
    """(data hash -> runs, key of `data` in which runs differ -> its values with their runs); a key that older code lacked has its default."""
    by_hash: dict[str, list[RunResult]] = {}
    for run in ours(reported(summary)):
        if run.facts.get("data_hash"):
            by_hash.setdefault(str(run.facts["data_hash"]), []).append(run)
    runs, defaults = [run for mine in by_hash.values() for run in mine], Data().model_dump(mode="json")
    filled = [{**defaults, **run.recipe.get("data", {})} for run in runs]
    differing = {}
    for key in dict.fromkeys(key for section in filled for key in section):
        texts = [json.dumps(section.get(key), sort_keys=True) for section in filled]
        if len(set(texts)) > 1:
            differing[key] = [(text, named(summary, [r for r, own in zip(runs, texts, strict=True) if own == text])) for text in dict.fromkeys(texts)]
    return by_hash, differing


def _unrecorded_keys(by_hash: Mapping[str, Sequence[RunResult]]) -> list[str]:
    """Keys of `data` that some runs recorded and others did not know."""
    recorded = [set(run.recipe.get("data", {})) for mine in by_hash.values() for run in mine]
    return sorted(set.union(*recorded) - set.intersection(*recorded)) if recorded else []


def _files(by_hash: Mapping[str, Sequence[RunResult]]) -> bool:
    return any(run.recipe.get("data", {}).get(key) for mine in by_hash.values() for run in mine for key in ("path", "eval_path", "preset"))


def _data(summary: Summary) -> Warned | None:
    by_hash, differing = data_sections(summary)
    new = _unrecorded_keys(by_hash)
    if len(by_hash) < 2 or (not differing and new and not _files(by_hash)):
        return None
    lines = [f"data_hash {code[:DIGITS]}: {named(summary, runs)}." for code, runs in by_hash.items()]
    lines += [f"data.{key}: {'; '.join(f'{value} in {who}' for value, who in values)}." for key, values in differing.items()]
    if not differing and new:
        known = f"older code knew no {_keys(new)}, which enter the hash"
        lines.append(f"Recipes ask for the same data ({known}); whether the files changed is not known.")
    elif not differing:
        lines.append("Recipes ask for the same data, so the content of its files changed between these runs.")
    return Warned(heading="Runs on different data", lines=tuple(lines))


def _keys(keys: Sequence[str]) -> str:
    return listed([f"data.{key}" for key in keys])


def data_row(summary: Summary) -> str:
    """The hash of the data, and why there are several where the data are the same; empty where nothing was recorded."""
    by_hash, differing = data_sections(summary)
    codes = [code[:DIGITS] for code in by_hash]
    if len(codes) < 2:
        return f"hash {codes[0]}, the same for every run" if codes else ""
    text = "; ".join(f"hash {code[:DIGITS]}: {named(summary, runs)}" for code, runs in by_hash.items())
    new = _unrecorded_keys(by_hash)
    if differing or not new or _files(by_hash):
        return text
    return f"{text}. The same data: older code knew no {_keys(new)}, which stand at their defaults and enter the hash all the same"


def commits_row(summary: Summary) -> str:
    """Every commit that a reported run or a run of the search ran on."""
    commits = [str(run.facts.get("git_commit", "")) for run in ours([*searched(summary), *reported(summary)])]
    return ", ".join(commit[:DIGITS] for commit in dict.fromkeys(commits) if commit) or "unknown"


def at_a_time(runs: Iterable[RunResult]) -> int:
    """How many of these runs overlapped at most on one machine, from the start of each to its last status; 0 where no times were recorded."""
    events: dict[str, list[tuple[datetime, int]]] = {}
    for run in ours(runs):
        if run.facts.get("created") and run.ended:
            machine = events.setdefault(json.dumps(run.facts.get("hardware"), sort_keys=True), [])
            machine += [(_time(str(run.facts["created"])), 1), (_time(run.ended), -1)]
    most = 0
    for changes in events.values():
        running = 0
        for _, change in sorted(changes):  # an end before a start of the same second
            running += change
            most = max(most, running)
    return most


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


def wall_clock(summary: Summary) -> str:
    """Under how much of its own company the seconds were measured; empty where runs recorded no times."""
    most = at_a_time([*reported(summary), *searched(summary)])
    if not most:
        return ""
    shared = f"with up to {most} of these runs at a time on one machine" if most > 1 else "with one of these runs at a time"
    return f"seconds were measured {shared}; what else ran there is not recorded"


def _crowd(summary: Summary) -> Warned | None:
    most, workers = at_a_time([*reported(summary), *searched(summary)]), summary.comparison.workers
    if most <= workers:
        return None
    said = f"Seconds were measured with up to {most} runs of this comparison at a time (workers: {workers}): they depend on what ran beside a run."
    return Warned(heading="Runs overlapped", lines=(said,))
