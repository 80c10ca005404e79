"""What an arm's runs spent, as means over seeds, and which of their ledgers do not agree with their records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opd.comparison.results import RunResult
from opd.run.spending import Rates
from opd.run.training import LEDGER
from opd.timing.ledger import as_dict, read_ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmLedger:
    """Means over finished runs. tokens by who handled them; seconds of training and evaluation; busy, idle: seconds by role.

    energy (kWh) and money are None without prices. disagreements: sentences that name the run. whole: every run has
    records of its steps (those made elsewhere have none), so that all sums could be compared.
    """

    tokens: Mapping[str, float]
    seconds: Mapping[str, float]
    busy: Mapping[str, float]
    idle: Mapping[str, float]
    device_seconds: float
    energy: float | None
    money: float | None
    disagreements: tuple[str, ...]
    whole: bool


def arm_ledger(runs: Sequence[RunResult], rates: Rates, devices: int) -> ArmLedger | None:
    """The ledgers of finished runs at these prices; devices: 0 takes what each run recorded. None without runs."""
    read = [(run, read_ledger(run.folder, rates, devices)) for run in runs]
    if not read:
        return None
    found = [as_dict(ledger) for _, ledger in read]
    return ArmLedger(
        tokens=_means([one["tokens"] for one in found]),
        seconds=_means([one["seconds"] for one in found]),
        busy=_means([{role: spent["busy"] for role, spent in one["roles"].items()} for one in found]),
        idle=_means([{role: spent["idle"] for role, spent in one["roles"].items()} for one in found]),
        device_seconds=fmean(one["device_seconds"] for one in found),
        energy=None if not rates.watts else fmean(one["energy_kwh"] for one in found),
        money=None if not rates.priced else fmean(one["money"] for one in found),
        disagreements=tuple(f"seed {run.seed}: {said}" for run, ledger in read for said in ledger.disagreements),
        whole=all(any(what.endswith(LEDGER) for what in ledger.checked) for _, ledger in read),
    )


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run lacks counts as 0."""
    return {name: fmean(row.get(name, 0.0) for row in rows) for name in dict.fromkeys(name for row in rows for name in row)}
