"""A comparison as a typed, frozen tree: arms, seeds, one budget, one tuning grid for every arm."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opd.config.choices import imported, nearest
from opd.config.load import KINDS, PACKAGED, explain, find_recipe, kind_of, load_recipe, merge, parse_overrides, read_yaml
from opd.config.recipe import Recipe
from opd.config.spending import Prices
from opd.run.spending import QUANTITIES, Rates, from_totals

UNLIMITED_STEPS = 1_000_000  # under any other budget, steps do not stop a run
SPELLED = {
    "generated_tokens": "generated tokens",
    "scored_tokens": "learner and teacher tokens",
    "steps": "steps",
    "seconds": "training seconds",
    "device_seconds": "device-seconds",
    "money": "",
}
PRICED = ("money", "device_seconds")  # budgets that need to know prices or devices while a run trains


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Arm(_Frozen):
    """One way to train: a recipe and what is changed in it, or runs that exist already."""

    recipe: str = Field("", description="path or name of a recipe")
    runs: str = Field("", description="instead of a recipe: run folders that exist, {seed} for the seed (`opd import` makes them from TRL and W&B)")
    set: dict[str, Any] = Field({}, description="dotted recipe keys and their values, e.g. {teacher: live}")
    label: str = Field("", description="how the report calls it; empty: the arm's name")
    train: bool = Field(True, description="false: only evaluate the starting model (the base)")
    by: str = Field("", description="module:function that trains this arm instead of opd, for baselines from outside")

    @model_validator(mode="after")
    def _one_origin(self) -> "Arm":
        if bool(self.recipe) == bool(self.runs):
            raise ValueError("an arm needs either recipe (to train) or runs (folders that exist, e.g. runs/trl-grpo/seed-{seed})")
        if self.runs and (self.set or self.by):
            raise ValueError("an arm with runs is read as it is: leave out set and by")
        return self

    def folder(self, seed: int) -> Path:
        """The run folder of a seed, for an arm with `runs`."""
        return Path(self.runs.replace("{seed}", str(seed)))


class Budget(_Frozen):
    """What every run may spend: exactly one of these."""

    generated_tokens: int = Field(0, ge=0, description="student tokens generated, discarded ones included, evaluation not")
    scored_tokens: int = Field(0, ge=0, description="tokens that passed through learner and teachers, contexts included")
    steps: int = Field(0, ge=0, description="rollout steps")
    seconds: float = Field(0.0, ge=0, description="training seconds, evaluation not")
    device_seconds: float = Field(0.0, ge=0, description="training seconds times the devices that a run holds, idle or not")
    money: float = Field(0.0, ge=0, description="what training costs, by `prices`")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if sum(getattr(self, name) > 0 for name in SPELLED) != 1:
            raise ValueError(f"give exactly one of {', '.join(SPELLED)} (above 0)")
        return self

    def overrides(self) -> dict[str, Any]:
        """Recipe keys that impose this budget."""
        return {"steps": self.steps} if self.steps else {"steps": UNLIMITED_STEPS, f"budget.{self.unit}": getattr(self, self.unit)}

    def spell(self, currency: str) -> str:
        number = f"{self.amount:,.0f}" if self.amount == int(self.amount) else f"{self.amount:,g}"
        return f"{number} {SPELLED[self.unit] or currency}"

    @property
    def unit(self) -> str:
        return next(name for name in SPELLED if getattr(self, name))

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))

    def share(self, row: Mapping[str, Any], rates: Rates, devices: int) -> float:
        """How much of it a line of metrics.jsonl has spent, 0 to 1 and more."""
        if self.steps:
            return row.get("step", 0) / self.steps
        return QUANTITIES[self.unit][1](from_totals(row, {}, devices), rates) / self.amount


class Tune(_Frozen):
    """One grid for every arm, searched on dev with seeds that are not reported."""

    grid: dict[str, list[Any]] = Field(description="dotted recipe key -> values; every combination is tried")
    seeds: list[int] = Field([1000], min_length=1, description="seeds of the search, none of them reported")
    split: Literal["dev"] = Field("dev", description="the split that decides; test stays unseen")
    metric: Literal["best", "final", "area"] = Field("best", description="dev accuracy: highest, last, or mean over generated tokens")
    budget: Budget | None = Field(None, description="budget of a search run; empty: that of the reported runs")

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid, in order."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Comparison(_Frozen):
    """Arms x seeds under one budget, reported together."""

    name: str = Field(description="folder under runs/; the file's name where it says none")
    title: str = Field("", description="headline of the report; empty: the name")
    description: str = Field("", description="a sentence or two put under the headline")
    arms: dict[str, Arm] = Field(min_length=1, description="what is compared, by name; a recipe, or runs that exist")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the reported runs")
    budget: Budget = Field(description="what every run may spend, the same for all")
    prices: Prices = Field(Prices(), description="what spending costs, the same for all arms; they train nothing anew unless the budget is money")
    eval: dict[str, Any] = Field({}, description="keys of the recipes' `eval`, the same for all arms")
    base_temperatures: list[float] = Field(
        [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], description="decodings of the untrained arm; the best one on dev gets a row of its own"
    )
    tune: Tune | None = Field(None, description="search before the reported runs; empty: every arm as its recipe says")
    baseline: str = Field("", description="arm that differences and ratios are taken against; empty: the first trained one")
    target: float = Field(0.8, gt=0, lt=1, description="dev accuracy whose cost is compared")
    workers: int = Field(2, gt=0, description="single-threaded processes")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="log every run to W&B: one group, an arm a job type, tags for search and seed"
    )
    project: str = Field("opd", description="W&B project")
    limit_seconds: float = Field(24 * 3600.0, gt=0, description="a run that takes longer is ended and reported as failed")

    @model_validator(mode="after")
    def _consistent(self) -> "Comparison":
        trained = [name for name, arm in self.arms.items() if arm.train]
        for budget in (self.budget, self.tune.budget if self.tune else None):
            if budget and budget.money and not self.prices.priced:
                raise ValueError(f"budget.money={budget.money:g} needs a price: set prices.device_hour or prices.teacher_million of the comparison")
        if self.baseline and self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is not an arm{nearest(self.baseline, list(self.arms))}; arms: {', '.join(self.arms)}")
        if not trained:
            raise ValueError("no arm trains: give at least one arm without `train: false`")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {self.seeds}")
        for name in self.arms:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"arm {name!r} names a folder: use letters, digits, - and _ (and `label` for the report)")
        if self.tune:
            shared = sorted(set(self.tune.seeds) & set(self.seeds))
            if shared:
                raise ValueError(f"tune.seeds {shared} are also reported seeds: a choice made on them would flatter the tuned arms")
            if not self.tune.grid or not all(self.tune.grid.values()):
                raise ValueError("tune.grid needs at least one key with at least one value, e.g. {optimizer.lr: [1e-4, 3e-4]}")
        return self

    @property
    def rates(self) -> Rates:
        return Rates(**self.prices.model_dump(exclude={"devices"}))

    @property
    def reference(self) -> str:
        """The arm that others are compared against."""
        return self.baseline or next(name for name, arm in self.arms.items() if arm.train)

    @property
    def base(self) -> str | None:
        """The arm that is not trained, if any."""
        return next((name for name, arm in self.arms.items() if not arm.train), None)


def load_comparison(reference: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Comparison:
    """Read a comparison file and validate it with the recipes of all its arms. Raises ValueError with the fix, before any work."""
    path = find_comparison(reference)
    raw = read_yaml(path)
    if "arms" not in raw and {"method", "model", "objective", "stages", "steps", "recipe", "view"} & set(raw):
        raise ValueError(_not_a_comparison(reference))
    raw.setdefault("name", path.stem)
    for key, value in parse_overrides(overrides).items():
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        raw = merge(raw, nested)
    comparison = parse_comparison(raw, origin=str(reference))
    for name, arm in comparison.arms.items():
        if arm.runs:
            _check_runs(name, arm, comparison.seeds if arm.train else comparison.seeds[:1])
            continue
        if arm.by:
            imported(arm.by, f"arm {name!r}: by")
        for point in comparison.tune.points() if comparison.tune and arm.train else [{}]:
            arm_recipe(comparison, name, comparison.seeds[0], point)
    return comparison


def _check_runs(name: str, arm: Arm, seeds: Sequence[int]) -> None:
    """Raises ValueError where a folder is missing or unfinished, or one folder would stand for several seeds."""
    if len(seeds) > 1 and "{seed}" not in arm.runs:
        raise ValueError(f"arm {name!r}: runs={arm.runs} names one folder for {len(seeds)} seeds; write {{seed}} where the seed belongs")
    for seed in seeds:
        status = arm.folder(seed) / "status.json"
        state = json.loads(status.read_text(encoding="utf-8")).get("state") if status.is_file() else "missing"
        if state != "finished":
            raise ValueError(f"arm {name!r}, seed {seed}: {arm.folder(seed)} is no finished run folder ({state}); `opd import` makes them")


def find_comparison(reference: str) -> Path:
    """The file for a path or a name under recipes/compare."""
    path = Path(reference)
    if path.is_file():
        return path
    name = path.name if path.parent.name == "compare" else reference
    if path.stem in {run.stem for root in (Path("recipes"), *PACKAGED) for run in (root / "runs").glob("*.yaml")}:
        raise ValueError(_not_a_comparison(reference))
    return find_recipe(name, kind="compare")


def _not_a_comparison(origin: str) -> str:
    if (noun := kind_of(origin)) in (KINDS["methods"], KINDS["hardware"]):
        return f"{origin} is {noun}, not a comparison: `opd show` lists the comparisons"
    return f"{origin} is a recipe of one run, not a comparison: use opd train {origin} (or opd check {origin})"


def parse_comparison(raw: Mapping[str, Any], *, origin: str = "comparison") -> Comparison:
    """Validate a mapping as a comparison. Raises ValueError with the nearest valid name for an unknown key."""
    try:
        return Comparison.model_validate(_floats(raw))
    except ValidationError as error:
        raise ValueError(explain(error, Comparison, origin)) from None


def _floats(value: Any) -> Any:
    """YAML reads 3e-4 as text; make it a number."""
    if isinstance(value, Mapping):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def arm_overrides(comparison: Comparison, name: str, seed: int, point: Mapping[str, Any], *, tuning: bool = False) -> dict[str, Any]:
    """Dotted recipe keys of one run: the arm's own, the budget, the evaluation, the tuned values and the seed, later ones winning."""
    arm = comparison.arms[name]
    budget = comparison.budget
    evaluation = {f"eval.{key}": value for key, value in comparison.eval.items()}
    if tuning:
        assert comparison.tune is not None
        budget = comparison.tune.budget or budget
        evaluation["eval.temperatures"] = []  # the test split is not looked at
    if not arm.train:
        evaluation["eval.temperatures"] = comparison.base_temperatures
    limits = budget.overrides()
    if budget.unit in PRICED:
        limits |= {f"prices.{key}": value for key, value in comparison.prices.model_dump(exclude_defaults=True).items()}
    if "steps" in arm.set and not budget.steps:
        del limits["steps"]
    return {**arm.set, **limits, **evaluation, **point, "seed": seed, **_tracking(comparison, name, seed, tuning=tuning)}


def _tracking(comparison: Comparison, name: str, seed: int, *, tuning: bool) -> dict[str, Any]:
    """A W&B report groups by group and job type: the comparison and the arm."""
    if comparison.wandb == "disabled":
        return {}
    tags = ["search" if tuning else "reported", f"seed-{seed}"]
    return {
        "track.wandb": comparison.wandb, "track.project": comparison.project, "track.group": comparison.name, "track.job_type": name,
        "track.tags": tags,
    }  # fmt: skip


def arm_recipe(comparison: Comparison, name: str, seed: int, point: Mapping[str, Any], *, tuning: bool = False) -> Recipe:
    """The resolved recipe of one run. Raises ValueError that names the arm."""
    try:
        return load_recipe(comparison.arms[name].recipe, arm_overrides(comparison, name, seed, point, tuning=tuning))
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {error}") from None
