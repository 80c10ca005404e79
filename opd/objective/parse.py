"""An objective from its recipe form: names resolved, parameters checked, pairs judged legal, all before any work starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from opd_kernels import Divergence
from torch import Tensor

from opd.config.choices import Scheduled, name_of, nearest, parameters_of, resolve, split_choice, what_it_reads
from opd.credit import CREDITS, SHAPINGS
from opd.credit import TOKEN_CREDITS as OWN_TOKEN_CREDITS
from opd.evidence import VIEW_CREDITS, VIEW_FIELDS
from opd.objective.divergences import DENSE, DIVERGENCES, ESTIMATORS, sampled_reverse_kl
from opd.objective.fields import FIELDS as BATCH_FIELDS
from opd.objective.findings import Setting
from opd.objective.legality import check_objective, check_term
from opd.objective.routes import ROUTES
from opd.objective.schedules import SCHEDULES
from opd.objective.supports import SUPPORTS, Support, sampled
from opd.objective.surrogates import SURROGATES
from opd.objective.targets import TARGETS
from opd.objective.terms import REDUCTIONS, Objective, Schedule, Term
from opd.objective.weights import GATES, WEIGHTS

TOKEN_CREDITS, FIELDS = {**OWN_TOKEN_CREDITS, **VIEW_CREDITS}, {**BATCH_FIELDS, **VIEW_FIELDS}
COMMON_KEYS = ("name", "signal", "weight", "route", "reduce", "coef", "context", "allow")
KINDS: Mapping[str, tuple[str, ...]] = {
    "distill": ("support", "target"),
    "policy": ("advantage", "shape"),
    "nll": (),
    "student_entropy": (),
    "reference_kl": (),
    "match": (),
}


def build_objective(
    specs: Sequence[Mapping[str, Any]], setting: Setting | None = None, controllers: Mapping[str, Any] | None = None
) -> Objective:
    """The objective of a recipe's `objective:` list. controllers: name -> choice of a schedule, for views.

    `setting` holds what the rest of the recipe says (signals, group size, source of the answers); what it leaves out is not checked.
    Raises ValueError naming the term, what is wrong, and what would be legal.
    """
    if not specs:
        raise ValueError("objective: no terms; give at least one of " + ", ".join(f"{kind}: ..." for kind in KINDS))
    setting = setting or Setting()
    terms: list[Term] = []
    for index, spec in enumerate(specs):
        where = f"objective.{index}"
        term = _filled(_term(spec, where, taken={term.name for term in terms}), setting)
        terms.append(check_term(term, setting, where, spec.get("allow", ())))
    check_objective(terms)
    named = {name: _schedule(choice, f"controllers.{name}") for name, choice in (controllers or {}).items()}
    return Objective(terms=tuple(terms), controllers=named)


def _term(spec: Mapping[str, Any], where: str, taken: set[str]) -> Term:
    kind = _kind(spec, where)
    name = str(spec.get("name") or next(n for i in range(1, 99) if (n := kind if i == 1 else f"{kind}_{i}") not in taken))
    if name in taken or not name.isidentifier():
        raise ValueError(f"{where}.name: {name!r} must be a plain word that no other term has")
    weights, gates, fields = _weights(spec.get("weight", "ones"), f"{where}.weight")
    route = "has_view" if kind in ("distill", "reference_kl", "match") else "all"
    reduce = resolve(spec.get("reduce", "token_mean"), REDUCTIONS, f"{where}.reduce")()
    signal = str(spec.get("signal", "reference" if kind == "reference_kl" else "main"))
    make = {"distill": _distill, "policy": _policy, "nll": _nll, "student_entropy": _entropy, "reference_kl": _reference_kl, "match": _match}[kind]
    return Term(
        name=name,
        signal=signal if kind in ("distill", "reference_kl", "match") else None,
        view_signal=signal,
        weights=weights,
        gates=gates,
        fields=fields,
        route=resolve(spec.get("route", route), ROUTES, f"{where}.route", SCHEDULES),
        reduce=reduce,
        coef=_schedule(spec.get("coef", 1.0), f"{where}.coef"),
        context=str(spec.get("context", "")),
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
    loss = resolve(spec["distill"], DIVERGENCES, f"{where}.distill", SCHEDULES)
    target = resolve(spec["target"], TARGETS, f"{where}.target", SCHEDULES) if spec.get("target", "teacher") != "teacher" else None
    dense = _dense(spec["distill"], loss) if support.kind == "full" else None
    if support.kind == "sampled" and split_choice(spec["distill"], where) == ("reverse_kl", {}):
        loss = sampled_reverse_kl
    scope = "sequence" if support.kind == "spans" else "token"  # a span's tokens must come together
    return {"kind": "divergence", "loss": loss, "support": support, "dense": dense, "target": target, "scope": scope}


def _dense(choice: Any, loss: Callable[..., Tensor]) -> Divergence | None:
    name, _ = split_choice(choice, "distill")
    if name in DENSE and any(isinstance(value, Scheduled) for value in parameters_of(loss).values()):
        raise ValueError(f"distill: {name}: a parameter on support full cannot change while training; schedule coef, or use a top-k support")
    given = {key: value for key, value in parameters_of(loss).items() if key != "token_clip"}  # a bound on the sum, not in it
    return DENSE[name](**given) if name in DENSE else None


def _policy(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "advantage" not in spec:
        raise ValueError(f"{where}: a policy term needs an advantage: {', '.join([*CREDITS, *TOKEN_CREDITS])}")
    loss = resolve(spec["policy"], SURROGATES, f"{where}.policy", SCHEDULES)
    credit, token_credits = _chain(_listed(spec["advantage"]), f"{where}.advantage")
    shape = tuple(resolve(choice, SHAPINGS, f"{where}.shape", SCHEDULES) for choice in _listed(spec.get("shape", ())))
    if shape and credit is None:
        raise ValueError(f"{where}.shape adds to the reward, which no advantage here reads; put one of {', '.join(CREDITS)} first")
    return {
        "kind": "surrogate",
        "loss": loss,
        "credit": credit,
        "token_credits": token_credits,
        "shape": shape,
        "scope": "sequence" if "sequence" in what_it_reads(loss) else "token",
    }


def _listed(choices: Any) -> list[Any]:
    return list(choices) if isinstance(choices, list | tuple) else [choices]


def _chain(choices: list[Any], where: str) -> tuple[Callable[..., Tensor] | None, tuple[Callable[..., Any], ...]]:
    """(group credit or None, token credits): what each answer gets, then what its tokens make of it."""
    functions = [resolve(choice, {**CREDITS, **TOKEN_CREDITS}, where, SCHEDULES) for choice in choices]
    per_token = [_is_token_credit(choice, function) for choice, function in zip(choices, functions, strict=True)]
    if not functions or not all(per_token[1:]):
        raise ValueError(f"{where}: an advantage is one of {', '.join(CREDITS)}, then any of {', '.join(TOKEN_CREDITS)}; found {choices!r}")
    return (None, tuple(functions)) if per_token[0] else (functions[0], tuple(functions[1:]))


def _is_token_credit(choice: Any, advantage: Callable[..., Any]) -> bool:
    """A function of one's own fills tokens when it names the signal it reads, or reads the batch."""
    name, _ = split_choice(choice, "advantage")
    return name in TOKEN_CREDITS or (name == "fn" and ("signal" in parameters_of(advantage) or "batch" in what_it_reads(advantage)))


def _filled(term: Term, setting: Setting) -> Term:
    """Shapings learn the recipe's max_tokens where they leave it open. Raises ValueError where nobody says it."""
    shape = []
    for function in term.shape:
        if "max_tokens" in parameters_of(function) and parameters_of(function)["max_tokens"] is None:
            if setting.max_tokens is None:
                raise ValueError(f"term {term.name}: {name_of(function)} needs max_tokens, the longest answer in tokens")
            function = partial(function, max_tokens=setting.max_tokens)
        shape.append(function)
    return replace(term, shape=tuple(shape))


def _nll(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if spec["nll"]:
        raise ValueError(f"{where}.nll takes no parameters; write nll: {{}}")
    return {"kind": "nll", "loss": None}


def _entropy(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if spec["student_entropy"]:
        raise ValueError(f"{where}.student_entropy takes no parameters; write student_entropy: {{}}, with a negative coef to raise it")
    return {"kind": "entropy", "loss": None}


def _reference_kl(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"kind": "divergence", "loss": resolve(spec["reference_kl"], ESTIMATORS, f"{where}.reference_kl", SCHEDULES), "support": sampled()}


def _match(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    if spec["match"] != "hidden_states":
        raise ValueError(f"{where}.match is {spec['match']!r}; write match: hidden_states")
    return {"kind": "divergence", "loss": None, "support": Support(kind="hidden")}


def _weights(choices: Any, where: str) -> tuple[tuple[Callable[..., Any], ...], ...]:
    """(weights, gates, fields); a function of one's own that reads "batch" is a field."""
    weights, gates, fields = [], [], []
    for choice in _listed(choices):
        name, _ = split_choice(choice, where)
        function = resolve(choice, {**WEIGHTS, **GATES, **FIELDS}, where, SCHEDULES)
        if name != "ones":
            kind = gates if name in GATES else fields if name in FIELDS or "batch" in what_it_reads(function) else weights
            kind.append(function)
    return tuple(weights), tuple(gates), tuple(fields)


def _schedule(choice: Any, where: str) -> Schedule:
    if isinstance(choice, int | float) and not isinstance(choice, bool):
        choice = {"constant": {"value": float(choice)}}
    return resolve(choice, SCHEDULES, where)
