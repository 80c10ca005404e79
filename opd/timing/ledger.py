"""What a run spent, read from its folder: tokens, seconds by role with idle time, energy and money, and whether the sums agree with its records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opd.config.load import explain
from opd.config.spending import Prices
from opd.run.folder import read_lines, write_json
from opd.run.named import find_run
from opd.run.spending import Rates, Spent, from_totals, kilowatt_hours, money, role_seconds
from opd.run.training import LEDGER, step_tokens

WRITTEN = "ledger.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """One run's spending. spent: of training. evaluation_tokens, evaluation_seconds: by split.

    checked: the records that there were to compare with. disagreements: a sentence for every sum that they do not add up to.
    """

    steps: int
    spent: Spent
    rates: Rates
    evaluation_tokens: Mapping[str, int]
    evaluation_seconds: Mapping[str, float]
    checked: tuple[str, ...]
    disagreements: tuple[str, ...]


def read_ledger(folder: Path, rates: Rates | None = None, devices: int = 0) -> Ledger:
    """The ledger of a run folder, at the recipe's prices or at `rates`; devices: 0 takes what the run recorded.

    Raises ValueError for a folder that holds neither steps nor evaluations.
    """
    rows, evaluations = list(read_lines(folder / "metrics.jsonl")), list(read_lines(folder / "eval.jsonl"))
    if not rows and not evaluations:
        raise ValueError(f"{folder} holds no steps and no evaluations: opd ledger reads a run folder; `opd show` lists those here")
    path = folder / "resolved.json"
    resolved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    given = resolved.get("recipe", {}).get("prices", {})
    roles: dict[str, float] = {}
    for row in rows:
        phases = {name.removeprefix("seconds/"): value for name, value in row.items() if name.startswith("seconds/") and value is not None}
        roles = {role: roles.get(role, 0.0) + busy for role, busy in role_seconds(phases).items()}
    devices = devices or given.get("devices") or resolved.get("devices", 1)
    checked, disagreements = audit(folder, rows, evaluations)
    return Ledger(
        steps=rows[-1]["step"] if rows else 0,
        spent=from_totals(rows[-1] if rows else {}, {role: busy for role, busy in roles.items() if busy > 0}, devices),
        rates=rates or Rates(**{name: value for name, value in given.items() if name != "devices"}),
        evaluation_tokens=_by_split(evaluations, "tokens"),
        evaluation_seconds=_by_split(evaluations, "seconds"),
        checked=tuple(checked),
        disagreements=tuple(disagreements),
    )


def _by_split(evaluations: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    splits = dict.fromkeys(row["split"] for row in evaluations)
    return {split: sum(row.get(name, 0) for row in evaluations if row["split"] == split) for split in splits}


def audit(folder: Path, rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(what was compared, what does not agree), to the token.

    The counters of metrics.jsonl against the steps of ledger.jsonl and the evaluations before the last step; every evaluation against its answers.
    """
    checked, found = [], []
    events = [event for event in read_lines(folder / LEDGER) if "tokens" in event]
    if rows and events:
        checked.append(f"{len(events)} steps of {LEDGER}")
        if [event["step"] for event in events] != [row["step"] for row in rows]:
            found.append(f"{LEDGER} and metrics.jsonl do not hold the same steps")
        for name, counted in step_tokens(rows[-1]).items():
            if (total := sum(event["tokens"][name] for event in events)) != counted:
                found.append(f"{name} tokens: the steps add up to {total}, the counter says {counted}")
        if abs((taken := sum(row["seconds/step"] for row in rows)) - rows[-1]["seconds/total"]) > 1e-6 * taken:
            found.append(f"seconds: the steps add up to {taken:.6f}, the counter says {rows[-1]['seconds/total']:.6f}")
    earlier = [row for row in evaluations if row["split"] == "dev" and rows and row["step"] < rows[-1]["step"]]
    if rows and "tokens/evaluation" in rows[-1] and all("tokens" in row for row in earlier):  # exports of W&B know accuracies only
        before = sum(row["tokens"] for row in earlier)
        checked.append("evaluations before the last step")
        if before != rows[-1]["tokens/evaluation"]:
            found.append(f"evaluation tokens: eval.jsonl adds up to {before}, the counter says {rows[-1]['tokens/evaluation']:.0f}")
    kept = [row for row in evaluations if "tokens" in row and (folder / row["generations"]).is_file()]
    for row in kept:
        if (total := sum(line["length"] for line in read_lines(folder / row["generations"]))) != row["tokens"]:
            found.append(f"evaluation after step {row['step']} ({row['split']}): its answers have {total} tokens, its line says {row['tokens']}")
    return checked + ([f"the answers of {len(kept)} evaluations"] if kept else []), found


def as_dict(ledger: Ledger) -> dict[str, Any]:
    """What ledger.json holds; energy and money are null without prices."""
    spent, rates = ledger.spent, ledger.rates
    examined = {f"evaluation_{split}": tokens for split, tokens in ledger.evaluation_tokens.items()}
    tokens = {name: round(getattr(spent, name)) for name in ("student", "auxiliary", "teacher", "learner")}
    return {
        "steps": ledger.steps,
        "tokens": {**tokens, **examined},
        "seconds": {"training": spent.seconds, **{f"evaluation_{split}": seconds for split, seconds in ledger.evaluation_seconds.items()}},
        "roles": {role: {"busy": busy, "idle": max(0.0, spent.seconds - busy)} for role, busy in spent.roles.items()},
        "devices": spent.devices,
        "device_seconds": spent.device_seconds,
        "energy_kwh": kilowatt_hours(spent.device_seconds, rates) if rates.watts else None,
        "energy_from": f"configured: {rates.watts:g} W a device, nothing was measured" if rates.watts else None,
        "money": money(spent.device_seconds, spent.teacher, rates) if rates.priced else None,
        "currency": rates.currency if rates.priced else None,
        "checked": list(ledger.checked),
        "disagreements": list(ledger.disagreements),
    }


def write_ledger(folder: Path, ledger: Ledger) -> Path:
    """Put ledger.json into the run folder."""
    write_json(folder / WRITTEN, as_dict(ledger))
    return folder / WRITTEN


def describe(name: str, ledger: Ledger) -> str:
    """The ledger as text."""
    content = as_dict(ledger)
    said = [f"{name}: {ledger.steps} steps", "", "tokens"]
    said += [f"  {role:<22}{count:>14,}" for role, count in content["tokens"].items()]
    said += ["", "seconds"] + [f"  {what:<22}{seconds:>14.1f}" for what, seconds in content["seconds"].items()]
    said += ["", "training by role" + " " * 14 + "busy s        idle s"]
    said += [f"  {role:<22}{one['busy']:>14.1f}{one['idle']:>14.1f}" for role, one in content["roles"].items()]
    devices = f"{ledger.spent.devices} device{'s' if ledger.spent.devices > 1 else ''}"
    said += ["", f"  {'device-seconds':<22}{content['device_seconds']:>14.1f}   ({devices})"]
    energy, cost = content["energy_kwh"], content["money"]
    said.append("  energy: not known (prices.watts)" if energy is None else f"  {'energy, kWh':<22}{energy:>14.4f}   ({content['energy_from']})")
    said.append("  money: not priced (prices.device_hour ...)" if cost is None else f"  {'money, ' + content['currency']:<22}{cost:>14.4f}")
    verdict = "DOES NOT AGREE" if ledger.disagreements else "agrees to the token" if ledger.checked else "not checked"
    said += ["", f"compared with {', '.join(ledger.checked) or 'nothing: this run has no records of its steps'}: {verdict}"]
    return "\n".join([*said, *(f"  - {sentence}" for sentence in ledger.disagreements)])


def ledger(run: str, overrides: Mapping[str, Any]) -> str:
    """`opd ledger RUN [device_hour=2.5 watts=300 ...]`: the text; the figures go to RUN/ledger.json. Raises ValueError with the fix."""
    folder = find_run(run)
    path = folder / "resolved.json"
    given = json.loads(path.read_text(encoding="utf-8"))["recipe"].get("prices", {}) if path.is_file() else {}
    try:
        prices = Prices.model_validate({**given, **overrides})
    except ValidationError as error:
        raise ValueError(explain(error, Prices, "opd ledger")) from None
    found = read_ledger(folder, Rates(**prices.model_dump(exclude={"devices"})), prices.devices)
    write_ledger(folder, found)
    return describe(folder.name, found)
