"""A choice in a recipe: a bare name, {name: parameters}, or {fn: "package.module:function", ...parameters} for a function of one's own.

Names stand in visible tables at the bottom of the modules that hold the functions. Parameters are the functions' keyword-only
arguments; they are checked against the signature, so that a misspelt one is refused before any work starts.
"""

import contextlib
import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, ends included unless `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        relation = "above" if self.open else "at least"
        upper = f" and {'below' if self.open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return f"{relation} {self.low:g}{upper}"


Positive = Annotated[float, Range(0.0, open=True)]
NonNegative = Annotated[float, Range(0.0)]
Share = Annotated[float, Range(0.0, 1.0)]
InnerShare = Annotated[float, Range(0.0, 1.0, open=True)]
Count = Annotated[int, Range(1)]


def reads(*what: str) -> Callable[[F], F]:
    """Declares what a function needs beyond its sample: "old_logp", "entropy", "signal_entropy", "behaviour_logp", "group"."""

    def mark(function: F) -> F:
        function.reads = frozenset(what)  # type: ignore[attr-defined]
        return function

    return mark


def what_it_reads(function: Callable[..., Any]) -> frozenset[str]:
    """What `reads` declared, seen through bound parameters."""
    return getattr(function.func if isinstance(function, partial) else function, "reads", frozenset())


def name_of(function: Callable[..., Any]) -> str:
    """The function's own name, seen through bound parameters."""
    return (function.func if isinstance(function, partial) else function).__name__


def parameters_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The bound parameters, defaults filled in; empty for a function that takes none."""
    return function.keywords if isinstance(function, partial) else {}


def nearest(name: str, valid: Collection[str]) -> str:
    """' (did you mean X?)' when something close exists, else ''."""
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def split_choice(choice: Any, where: str) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of a choice as YAML gives it. Raises ValueError for anything else."""
    if isinstance(choice, str):
        return choice, {}
    if isinstance(choice, Mapping) and "fn" in choice:
        return "fn", dict(choice)
    if isinstance(choice, Mapping) and len(choice) == 1:
        [(name, parameters)] = choice.items()
        if parameters is None or isinstance(parameters, Mapping):
            return str(name), dict(parameters or {})
        raise ValueError(f"{where}: {name} takes named parameters, not {parameters!r}; write {{{name}: {{parameter: value}}}}")
    raise ValueError(f"{where}: {choice!r} is not a choice; write a name, {{name: {{parameter: value}}}} or {{fn: module:function}}")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A parameter that a schedule sets before each step."""

    schedule: Callable[..., Any]


def resolve(
    choice: Any, table: Mapping[str, Callable[..., Any]], where: str, schedules: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """The function that a choice names, its parameters checked and bound with their defaults.

    schedules: names that may stand for a number among the parameters, {name: {parameters}}; such a parameter is bound as Scheduled.
    Raises ValueError for an unknown name or parameter (with the nearest valid one), a missing one, or a value of the wrong type or range.
    """
    name, parameters = split_choice(choice, where)
    if name == "fn":
        path = parameters.pop("fn")
        return _bind(imported(path, where), parameters, f"{where}: {path}", schedules or {})
    if name not in table:
        raise ValueError(f"{where}: unknown name {name!r}{nearest(name, table)}; valid: {', '.join(sorted(table))}")
    return _bind(table[name], parameters, f"{where}: {name}", schedules or {})


def imported(path: Any, where: str) -> Callable[..., Any]:
    """The function that package.module:function names, also of a module in the working directory. Raises ValueError where there is none."""
    module, _, name = str(path).partition(":")
    if not module or not name:
        raise ValueError(f"{where}: {path!r} names no function; write package.module:function")
    try:
        with _working_directory_importable():
            function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        missing = "the module must be importable from the working directory" if package == module.partition(".")[0] else f"pip install {package}"
        raise ValueError(f"{where}: cannot import {module!r} ({error}); {missing}") from None
    if not callable(function):
        raise ValueError(f"{where}: module {module!r} has no function {name!r}")
    return function


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Only while a user's module loads: left on the path, a folder `kernels` here would be taken for the library of that name."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _bind(function: Callable[..., Any], given: Mapping[str, Any], where: str, schedules: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    accepted = {name: p for name, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    hints = get_type_hints(function, include_extras=True)
    for name, value in given.items():
        if name not in accepted:
            valid = f"valid: {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"{where}: unknown parameter {name!r}{nearest(name, accepted)}; {valid}")
        if isinstance(value, Mapping) and schedules and _fits(1.0, _kind_of(hints.get(name, Any))):
            given = {**given, name: Scheduled(resolve(value, schedules, f"{where}.{name}"))}
        else:
            _check_value(value, hints.get(name, Any), f"{where}.{name}")
    missing = [name for name, p in accepted.items() if p.default is p.empty and name not in given]
    if missing:
        raise ValueError(f"{where}: needs {', '.join(missing)}")
    if not accepted:
        return function
    return partial(function, **{name: given.get(name, p.default) for name, p in accepted.items()})


def _kind_of(hint: Any) -> Any:
    """The type behind limits and options: float where a number may stand."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options]
    return float if float in kinds else kinds[0]


def _check_value(value: Any, hint: Any, where: str) -> None:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_fits(value, option) for option in options):
        return
    expected = " or ".join(spelled(option) for option in options)
    raise ValueError(f"{where} is {value!r}; it must be {expected}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        return _fits(value, kind) and all(value in limit for limit in limits)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def spelled(hint: Any) -> str:
    """A parameter's type and limits in words."""
    if get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        return " ".join([spelled(kind), *map(str, limits)])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list", type(None): "null"}.get(hint, str(hint))
