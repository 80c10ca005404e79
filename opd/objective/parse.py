"""An objective from its recipe form: names resolved, parameters checked, pairs judged legal, all before any work starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_kernels import Divergence
from torch import Tensor

from opd.choices import nearest, parameters_of, resolve, split_choice
from opd.credit import CREDITS, TOKEN_CREDITS
from opd.objective.divergences import DENSE, DIVERGENCES, ESTIMATORS, sampled_reverse_kl
from opd.objective.legality import Setting, check_objective, check_term
from opd.objective.routes import ROUTES
from opd.objective.schedules import SCHEDULES
from opd.objective.supports import SUPPORTS, Support, sampled
from opd.objective.surrogates import SURROGATES
from opd.objective.targets import TARGETS
from opd.objective.terms import REDUCTIONS, Objective, Schedule, Term
from opd.objective.weights import GATES, WEIGHTS

COMMON_KEYS = ("name", "signal", "weight", "route", "reduce", "coef", "allow")
KINDS: Mapping[str, tuple[str, ...]] = {
    "distill": ("support", "target"),
    "policy": ("advantage",),
    "nll": (),
    "reference_kl": (),
}


def build_objective(specs: Sequence[Mapping[str, Any]], setting: Setting | None = None) -> Objective:
    """The objective of a recipe's `objective:` list.

    `setting` holds what the rest of the recipe says (signals, group size, source of the answers); what it leaves out is not checked.
    Raises ValueError naming the term, what is wrong, and what would be legal.
    """
    if not specs:
        raise ValueError("objective: no terms; give at least one of " + ", ".join(f"{kind}: ..." for kind in KINDS))
    setting = setting or Setting()
    terms: list[Term] = []
    for index, spec in enumerate(specs):
        where = f"objective.{index}"
        term = _term(spec, where, taken={term.name for term in terms})
        terms.append(check_term(term, setting, where, spec.get("allow", ())))
    check_objective(terms)
    return Objective(terms=tuple(terms))


def _term(spec: Mapping[str, Any], where: str, taken: set[str]) -> Term:
    kind = _kind(spec, where)
    name = str(spec.get("name") or next(n for i in range(1, 99) if (n := kind if i == 1 else f"{kind}_{i}") not in taken))
    if name in taken or not name.isidentifier():
        raise ValueError(f"{where}.name: {name!r} must be a plain word that no other term has")
    weights, gates = _weights(spec.get("weight", "ones"), f"{where}.weight")
    route = "has_view" if kind in ("distill", "reference_kl") else "all"
    reduce = resolve(spec.get("reduce", "token_mean"), REDUCTIONS, f"{where}.reduce")()
    signal = str(spec.get("signal", "reference" if kind == "reference_kl" else "main"))
    make = {"distill": _distill, "policy": _policy, "nll": _nll, "reference_kl": _reference_kl}[kind]
    return Term(
        name=name,
        signal=signal if kind in ("distill", "reference_kl") else None,
        view_signal=signal,
        weights=weights,
        gates=gates,
        route=resolve(spec.get("route", route), ROUTES, f"{where}.route"),
        reduce=reduce,
        coef=_schedule(spec.get("coef", 1.0), f"{where}.coef"),
        **make(spec, where),
    )


def _kind(spec: Mapping[str, Any], where: str) -> str:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where}: a term is a mapping such as {{distill: forward_kl}}, not {spec!r}")
    kinds = [kind for kind in KINDS if kind in spec]
    valid = {*COMMON_KEYS, *KINDS} if len(kinds) != 1 else {kinds[0], *COMMON_KEYS, *KINDS[kinds[0]]}
    for key in spec:
        if key not in valid:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), valid)}; valid: {', '.join(sorted(valid))}")
    if len(kinds) != 1:
        raise ValueError(f"{where}: needs exactly one of {', '.join(KINDS)}; found {', '.join(kinds) or 'none'}")
    return kinds[0]


def _distill(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    support: Support = resolve(spec.get("support", "full"), SUPPORTS, f"{where}.support")()
    loss = resolve(spec["distill"], DIVERGENCES, f"{where}.distill")
    target = resolve(spec["target"], TARGETS, f"{where}.target") if spec.get("target", "teacher") != "teacher" else None
    dense = _dense(spec["distill"], loss) if support.kind == "full" else None
    if support.kind == "sampled" and split_choice(spec["distill"], where) == ("reverse_kl", {}):
        loss = sampled_reverse_kl
    return {"kind": "divergence", "loss": loss, "support": support, "dense": dense, "target": target}


def _dense(choice: Any, loss: Callable[..., Tensor]) -> Divergence | None:
    name, _ = split_choice(choice, "distill")
    return DENSE[name](**parameters_of(loss)) if name in DENSE else None


def _policy(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "advantage" not in spec:
        raise ValueError(f"{where}: a policy term needs an advantage: {', '.join([*CREDITS, *TOKEN_CREDITS])}")
    advantage = resolve(spec["advantage"], {**CREDITS, **TOKEN_CREDITS}, f"{where}.advantage")
    per_token = _is_token_credit(spec["advantage"], advantage)
    return {
        "kind": "surrogate",
        "loss": resolve(spec["policy"], SURROGATES, f"{where}.policy"),
        "credit": None if per_token else advantage,
        "token_credit": advantage if per_token else None,
    }


def _is_token_credit(choice: Any, advantage: Callable[..., Tensor]) -> bool:
    """A function of one's own fills tokens when it names the signal it reads."""
    name, _ = split_choice(choice, "advantage")
    return name in TOKEN_CREDITS or (name == "fn" and "signal" in parameters_of(advantage))


def _nll(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if spec["nll"]:
        raise ValueError(f"{where}.nll takes no parameters; write nll: {{}}")
    return {"kind": "nll", "loss": None}


def _reference_kl(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"kind": "divergence", "loss": resolve(spec["reference_kl"], ESTIMATORS, f"{where}.reference_kl"), "support": sampled()}


def _weights(choices: Any, where: str) -> tuple[tuple[Callable[..., Tensor], ...], tuple[Callable[..., Tensor], ...]]:
    weights, gates = [], []
    for choice in choices if isinstance(choices, list | tuple) else [choices]:
        name, _ = split_choice(choice, where)
        function = resolve(choice, {**WEIGHTS, **GATES}, where)
        if name != "ones":
            (gates if name in GATES else weights).append(function)
    return tuple(weights), tuple(gates)


def _schedule(choice: Any, where: str) -> Schedule:
    if isinstance(choice, int | float) and not isinstance(choice, bool):
        choice = {"constant": {"value": float(choice)}}
    return resolve(choice, SCHEDULES, where)
