"""An objective is a tuple of terms; a term is a record of small pure functions.

term = coef(step) x route[answer] x weight[token] x loss[token], summed over tokens, divided by the term's own global denominator
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from opd_kernels import Divergence
from torch import Tensor

from opd.config.choices import Positive, Scheduled, name_of, parameters_of, what_it_reads
from opd.objective.routes import RouteInput
from opd.objective.supports import Support
from opd.objective.targets import other_signals
from opd.objective.weights import TokenStatistics

Over = Literal["routed", "all", "weight"]
Schedule = Callable[..., Any]
SIGNAL_PARAMETERS = ("signal", "reference", "signals")
"""Parameters of a recipe's functions that hold the name of a signal, or a list of names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """What a term's sum is divided by, counted over all ranks and micro-batches of one optimiser step.

    token_mean: tokens. sequence_mean: each token by its answer's tokens, the sum by answers. constant: answers x length.
    Tokens count when in the loss mask and not dropped by a gate, answers when they have such a token; over "routed" only where the term
    applies (route above 0, signal available), over "all" everywhere: terms that split a batch then share one denominator; over "weight" as
    over "routed", each by its route's factor.
    """

    kind: Literal["token_mean", "sequence_mean", "constant"]
    over: Over = "routed"
    length: float = 1.0


def token_mean(*, over: Over = "routed") -> Reduction:
    """The number of tokens: long answers weigh more."""
    return Reduction(kind="token_mean", over=over)


def sequence_mean(*, over: Over = "routed") -> Reduction:
    """Each answer's own tokens, then the number of answers: all answers weigh the same."""
    return Reduction(kind="sequence_mean", over=over)


def constant(*, length: Positive, over: Over = "routed") -> Reduction:
    """Answers times `length` tokens, whatever they have (Dr. GRPO, arXiv 2503.20783)."""
    return Reduction(kind="constant", over=over, length=length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One summand. Which functions are set follows from `kind`:

    divergence: loss(student_logp, teacher_logp [N, K'] or, on support "sampled", [N]) -> [N]; `dense` is its record for support "full".
    surrogate: loss(student_logp, old_logp, advantage) -> ([N], clipped); the advantage comes from `credit`, then `token_credits`;
        `shape` adds to the reward that `credit` reads. scope "sequence": old_logp is then such that the ratio is the answer's.
    nll: loss is unused, the token loss is -log p. entropy: neither; it is the student's entropy over the whole vocabulary.
    signal: scores the term reads, None for surrogate and nll. view_signal: whose views the route asks about.
    weights see one token, gates its position; fields are made for the whole batch before the step (objective/fields.py).
    context: the signal under whose view the student learns here, "" for its own prompt.
    allow: the biased forms that the recipe runs knowingly.
    """

    name: str
    kind: Literal["divergence", "surrogate", "nll", "entropy"]
    loss: Callable[..., Any] | None
    signal: str | None = None
    view_signal: str = "main"
    support: Support | None = None
    dense: Divergence | None = None
    target: Callable[..., Tensor] | None = None
    weights: tuple[Callable[[TokenStatistics], Tensor], ...] = ()
    gates: tuple[Callable[[Tensor], Tensor], ...] = ()
    fields: tuple[Callable[..., list[Tensor]], ...] = ()
    route: Callable[[RouteInput], float]
    credit: Callable[..., Tensor] | None = None
    token_credits: tuple[Callable[..., Any], ...] = ()
    shape: tuple[Callable[..., float], ...] = ()
    reduce: Reduction
    coef: Schedule | float
    scope: Literal["token", "sequence"] = "token"
    context: str = ""
    allow: tuple[str, ...] = ()

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """All that a recipe chose for it."""
        single = (self.loss, self.target, self.credit, self.route)
        return (*(f for f in single if f is not None), *self.weights, *self.fields, *self.token_credits, *self.shape)

    @property
    def reads(self) -> frozenset[str]:
        """What its functions declared with `opd.config.choices.reads`."""
        return frozenset().union(*map(what_it_reads, self.functions))

    @property
    def asks_view(self) -> bool:
        """Whether its route goes by which answers `view_signal` has scores of."""
        return name_of(self.route).endswith("view") or name_of(self.route) == "wrong_by_teacher_perplexity"

    @property
    def supported_signals(self) -> tuple[str, ...]:
        """The signals that must be scored on its support: its own, and those of its target."""
        others = other_signals(self.target) if self.target else ()
        return tuple(name for name in (self.signal, *others) if name)

    @property
    def signals(self) -> frozenset[str]:
        """Every signal whose scores the term reads: its own, and those that its functions name in a parameter."""
        named = (parameters_of(function).get(key) for function in self.functions for key in SIGNAL_PARAMETERS)
        listed = (name for value in named for name in (value if isinstance(value, list) else [value]))
        return frozenset(name for name in (self.signal, *listed) if isinstance(name, str) and name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalNeeds:
    """What a scorer must deliver: its own top `k`, ids in `draws`, log-probs at the student's top-k ids or (`union` > 0) at these and the top
    `union` of every signal that has one, of both top-k what has no partner in the other tokenizer, final hidden states, the sampled tokens,
    the entropy over its whole vocabulary (without `entropy`, one that does not know it gives NaN, and only a meter goes empty)."""

    k: int = 0
    draws: int = 0
    student_support: bool = False
    unpaired: bool = False
    union: int = 0
    hidden: bool = False
    sampled: bool = True
    entropy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an objective asks of the steps before it.

    old_logp: a term compares with the weights of the rollout; with one update a batch the learner may leave it out (the ratio is then 1).
    drawn_logp: a function reads the log-probs of what drew the tokens, which are not the student's where answers are older than its weights.
    own_logp: a function made before the step reads the student's log-probs of answers that it did not sample.
    entropy: a weight reads the student's. student_topk: k of the ids that `prepare` must choose, 0 for none.
    separable: no term needs whole rows of the vocabulary or a whole answer, so the loss can run chunk by chunk.
    """

    old_logp: bool
    drawn_logp: bool
    own_logp: bool
    entropy: bool
    student_topk: int
    signals: Mapping[str, SignalNeeds]
    separable: bool
    full_terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The sum of its terms. controllers: schedules of the recipe that views read, by name.

    Filled in by `at`: scheduled, what the schedules gave at this step and remember, by metric name; controls, what the controllers gave.
    """

    terms: tuple[Term, ...] = field(default=())
    controllers: Mapping[str, Schedule] = field(default_factory=dict)
    scheduled: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, float] = field(default_factory=dict)

    def at(self, step: int, metrics: Mapping[str, float]) -> "Objective":
        """The same objective with every schedule as the number that it gives now, without the terms whose coefficient is then 0.

        What such a term alone reads is not scored. It stays where another term's route asks about the views of a signal that it reads.
        """
        found: dict[str, float] = {}
        terms = tuple(_at(term, step, metrics, found) for term in self.terms)
        controls = {name: scheduled_value(one, f"controllers/{name}", step, metrics, found) for name, one in self.controllers.items()}
        return replace(self, terms=_heard(terms), scheduled=found, controls=controls)

    @property
    def contexts(self) -> tuple[str, ...]:
        """The signals under whose views a term learns."""
        return tuple(sorted({term.context for term in self.terms if term.context}))

    @property
    def allowed(self) -> tuple[str, ...]:
        """The biased forms in use, to be printed beside results."""
        return tuple(sorted({name for term in self.terms for name in term.allow}))

    @property
    def needs(self) -> Needs:
        reads = frozenset[str]().union(*(term.reads for term in self.terms))
        full_terms = tuple(term for term in self.terms if term.support and term.support.kind in ("full", "hidden"))
        return Needs(
            old_logp="old_logp" in reads,
            drawn_logp="behaviour_logp" in reads,
            own_logp="own_logp" in reads,
            entropy="entropy" in reads or any(term.kind == "entropy" for term in self.terms),
            student_topk=max((t.support.k for t in self.terms if t.support and t.support.by_student), default=0),
            signals={name: self._signal_needs(name) for name in sorted(set().union(*(term.signals for term in self.terms)))},
            separable=not full_terms and all(term.scope == "token" for term in self.terms),
            full_terms=full_terms,
        )

    def _signal_needs(self, signal: str) -> SignalNeeds:
        supports = [term.support for term in self.terms if signal in term.supported_signals and term.support]
        functions = [function for term in self.terms for function in term.functions if "teacher_topk" in what_it_reads(function)]
        asked = [parameters_of(function)["k"] for function in functions if parameters_of(function)["signal"] == signal]
        return SignalNeeds(
            k=max([s.k for s in supports if s.kind in ("teacher_topk", "unpaired")] + asked, default=0),
            draws=max((s.k for s in supports if s.kind == "teacher_sample"), default=0),
            student_support=any(s.kind == "student_topk" for s in supports),
            unpaired=any(s.kind == "unpaired" for s in supports),
            union=max((s.k for s in supports if s.kind == "union"), default=0),
            hidden=any(s.kind in ("full", "hidden") for s in supports),
            entropy=any(
                parameters_of(function).get("signal", term.signal) == signal
                for term in self.terms
                for function in term.functions
                if "signal_entropy" in what_it_reads(function)
            ),
        )


def _at(term: Term, step: int, metrics: Mapping[str, float], found: dict[str, float]) -> Term:
    def bound(function: Callable[..., Any] | None) -> Any:
        if function is None or not any(isinstance(value, Scheduled) for value in parameters_of(function).values()):
            return function
        numbers = {
            name: scheduled_value(value.schedule, f"{term.name}/{name_of(function)}.{name}", step, metrics, found)
            for name, value in parameters_of(function).items()
            if isinstance(value, Scheduled)
        }
        return partial(function, **numbers)

    coef = scheduled_value(term.coef, f"{term.name}/coef", step, metrics, found) if callable(term.coef) else term.coef
    single = {name: bound(getattr(term, name)) for name in ("loss", "target", "credit", "route")}
    several = {name: tuple(map(bound, getattr(term, name))) for name in ("weights", "gates", "fields", "token_credits", "shape")}
    return replace(term, coef=coef, **single, **several)


def _heard(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms with a coefficient, and those that alone keep a signal scored of which they ask; all of them where none has one."""
    loud = [term for term in terms if term.coef != 0]
    asked = {term.view_signal for term in loud if term.asks_view} - frozenset[str]().union(*(term.signals for term in loud))
    return tuple(term for term in terms if not loud or term.coef != 0 or term.signals & asked)


def scheduled_value(schedule: Schedule, place: str, step: int, metrics: Mapping[str, float], found: dict[str, float]) -> float:
    """What the schedule gives; also noted in `found`, with what it remembers, unless it is constant."""
    prefix = f"schedule/{place}"
    if "state" not in what_it_reads(schedule):
        value = float(schedule(step, metrics))
        if name_of(schedule) != "constant":
            found[prefix] = value
        return value
    own = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(f"{prefix}/")}
    if prefix in metrics:
        own["value"] = metrics[prefix]
    state = schedule(step, metrics, own)
    found[prefix] = state["value"]
    found.update({f"{prefix}/{name}": value for name, value in state.items() if name != "value"})
    return state["value"]


REDUCTIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "constant": constant}
