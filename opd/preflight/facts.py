"""What can be known of a run without its weights: everything that loads in seconds, and a finding for everything that does not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from transformers import GenerationConfig, PreTrainedTokenizerBase

from opd.build import pretrained, shapes
from opd.build.problems import Problems, load_problems
from opd.build.served import check_served
from opd.build.speaking import check_drawing
from opd.build.stored import open_stores
from opd.build.student import config_at, load_tokenizer, room_for_prompts, served_paths, stands_in, student_config, student_path, tokenizer_at
from opd.build.system import check_support_sizes, check_tracking, learner_kind, objective_of, parse_weights
from opd.build.views import FOREIGN, OTHERS, checked_views, template_notes
from opd.config.choices import nearest
from opd.config.recipe import Recipe
from opd.contexts import check_hints
from opd.data.records import on_hub
from opd.guard.rules import parse_rules
from opd.objective import Objective, SignalNeeds
from opd.preflight.hub import hub_answers, missing_models
from opd.prompts import check_dataset_hint
from opd.sampler import parse_sampler
from opd.source import parse_source
from opd.text import chat
from opd.views import ViewSpec, resolve_view

T = TypeVar("T")
Weights = Mapping[str, tuple[str, Any]]  # signal -> (kind, value)
ON_PURPOSE = ": on purpose, "  # of opd.build.views.template_notes
SAMPLED_PROMPTS = 256  # whose lengths stand for all


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to know before a run. "error": it would not start or not learn; "warning": it may surprise; "note": as it is."""

    severity: Literal["error", "warning", "note"]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A recipe and what it names; None where it could not be read (a finding says why).

    teachers: signal -> configuration of an external model. prompt_lengths, text_lengths: tokens of the first prompts and of their `text` (a
    hint: "solution", "demonstration" ...). made_up: problems that stand in for those of a hub that does not answer.
    """

    recipe: Recipe
    objective: Objective | None
    weights: Mapping[str, tuple[str, Any]]
    problems: Problems | None
    tokenizer: PreTrainedTokenizerBase | None
    config: Any
    generation: GenerationConfig | None
    teachers: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, ViewSpec] = field(default_factory=dict)
    made_up: bool = False
    prompt_lengths: tuple[int, ...] = ()
    text: str = "solution"
    text_lengths: tuple[int, ...] = ()


def gather(recipe: Recipe) -> tuple[Facts, list[Finding]]:
    """Everything about a recipe that needs no weights. Independent parts are read whatever becomes of the others."""
    found: list[Finding] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except ValueError as error:
            found.append(Finding(severity="error", sentence=str(error)))
            return None

    asked, recipe = recipe, without_hub(recipe, found)
    objective = attempt(partial(objective_of, recipe))
    weights = {name: parsed for name, signal in recipe.signals.items() if (parsed := attempt(partial(parse_weights, name, signal.weights)))}
    served = attempt(partial(served_paths, recipe, weights)) or {}
    for name, path in served.items() if objective else ():
        attempt(partial(check_served, recipe, name, path, objective.needs.signals.get(name, SignalNeeds())))
    if (recipe.engine.kind == "vllm" or served) and not recipe.target.device:  # another machine's GPUs cannot be looked at
        attempt(partial(_check_placement, recipe))
    attempt(partial(parse_rules, recipe.guard.action, recipe.guard.rules))
    attempt(partial(learner_kind, recipe))
    attempt(partial(check_tracking, recipe.track.wandb))
    if (sampler := attempt(partial(parse_sampler, recipe.rollout.sampler))) is not None:
        attempt(partial(check_drawing, sampler, with_models(recipe, weights)))
    problems = attempt(partial(load_problems, recipe, None))
    mixture = parse_source(recipe.rollout.source) if problems else None
    if problems and mixture:
        attempt(lambda: check_dataset_hint(problems.train if mixture.reads_data else (), mixture.hint))
    learned = mixture.hint if mixture and mixture.reads_data else "solution"
    views = _views(recipe, problems, attempt)
    all_read = len(weights) == len(recipe.signals)
    if problems and objective and all_read:
        attempt(partial(checked_views, recipe, problems, objective, weights))
    path = attempt(partial(student_path, recipe))
    tokenizer = attempt(partial(load_tokenizer, recipe, problems)) if problems and path is not None else None
    config = None
    if tokenizer is not None:
        config = attempt(partial(student_config, recipe, path, tokenizer))
        _judge(recipe, tokenizer, config, objective, weights, attempt)
        if tokenizer.chat_template and all_read:
            notes = attempt(partial(template_notes, recipe, tokenizer, weights)) or []
            found += [Finding(severity="note" if ON_PURPOSE in sentence else "warning", sentence=sentence) for sentence in notes]
    facts = Facts(
        recipe=asked,
        objective=objective,
        weights=weights,
        problems=problems,
        tokenizer=tokenizer,
        config=config,
        generation=_generation(recipe, path) if path else None,
        teachers=_teachers(recipe, weights, tokenizer, attempt),
        views=views,
        made_up=recipe is not asked,
        prompt_lengths=() if recipe is not asked else _lengths(problems, tokenizer, attempt),
        text=learned,
        text_lengths=() if recipe is not asked else _text_lengths(problems, tokenizer, learned),
    )
    return facts, found


def _judge(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Any, objective: Objective | None, weights: Weights, attempt: Callable[..., Any]
) -> None:
    """What the student's configuration and tokenizer decide."""
    if config is not None:
        attempt(partial(room_for_prompts, recipe, config, "the student", recipe.engine.kind == "vllm"))
    if objective:
        attempt(lambda: check_support_sizes(objective, len(tokenizer)))
    if objective and len(weights) == len(recipe.signals):
        attempt(partial(open_stores, recipe, weights, objective, tokenizer))


def _views(recipe: Recipe, problems: Problems | None, attempt: Callable[..., Any]) -> dict[str, ViewSpec]:
    if problems is None:
        return {}
    specs = {name: attempt(partial(resolve_view, signal.view, problems.templates)) for name, signal in recipe.signals.items()}
    for name, spec in specs.items():
        if spec is not None:
            attempt(partial(check_hints, name, spec, problems.train))
    return {name: spec for name, spec in specs.items() if spec is not None}


def without_hub(recipe: Recipe, found: list[Finding]) -> Recipe:
    """The recipe as it can be read here: with shipped sizes and made-up problems where the hub does not answer, and a warning that says so."""
    if recipe.model.init == "random" or recipe.init:
        return recipe
    known = shapes.public_shapes()
    if recipe.model.path not in known:
        if on_hub(recipe.model.path) and missing_models([recipe.model.path]) and not hub_answers():
            close = nearest(recipe.model.path, known)
            said = (
                f"model.path: {recipe.model.path!r} is no folder here, and the hub cannot be asked for it{close}; give a folder, or a hub name there"
            )
            found.append(Finding(severity="error", sentence=said))
        return recipe
    teachers = [path for name, signal in recipe.signals.items() for path in _paths(name, signal.weights)]
    missing = missing_models([recipe.model.path, *teachers])
    data = [source for source in (recipe.data.preset, recipe.data.path) if source and (source == recipe.data.preset or on_hub(source))]
    if not missing and not data or hub_answers():
        return recipe
    names = ", ".join(dict.fromkeys([*missing, *data]))
    sentence = (
        f"the hub cannot be reached, so {names} could not be looked at: sizes come from the project's own table, and stand-ins take the place of "
        "tokenizer, chat template and problems; check again where the hub answers"
    )
    found.append(Finding(severity="warning", sentence=sentence))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": "random"})})


def _check_placement(recipe: Recipe) -> None:
    """Raises ValueError for actors that this machine cannot have."""
    if find_spec("ray") is None:
        raise ValueError('engine=vllm needs Ray and vLLM here: pip install "opd-train[gpu]", or engine=torch; for another machine give device=h100')
    import_module("opd.build.actors").check_placement(recipe)  # which imports Ray


def with_models(recipe: Recipe, weights: Mapping[str, tuple[str, Any]]) -> set[str]:
    """Signals that have a model of their own in the learner's process."""
    return {name for name, (kind, _) in weights.items() if kind in ("external", FOREIGN) or (kind == "frozen" and recipe.model.lora is None)}


def _paths(name: str, weights: Any) -> list[str]:
    try:
        kind, path = parse_weights(name, weights)
    except ValueError:  # found again, and reported, by whoever reads the signals
        return []
    return [path] if kind in OTHERS else []


def _generation(recipe: Recipe, path: str) -> GenerationConfig | None:
    if stands_in(recipe, path):
        return shapes.shape_generation(path, recipe.model.scale)
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # many folders have none
        return None


def _teachers(
    recipe: Recipe, weights: Mapping[str, tuple[str, Any]], tokenizer: PreTrainedTokenizerBase | None, attempt: Callable[..., Any]
) -> dict[str, Any]:
    configs = {}
    for name, (kind, path) in weights.items():
        if kind in OTHERS and tokenizer is not None:
            config = attempt(partial(_teacher, recipe, path, None if kind == FOREIGN else tokenizer))
            if config is not None:
                configs[name] = config
    return configs


def _teacher(recipe: Recipe, path: str, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    folder = pretrained.find_model(path)
    if tokenizer is not None:
        pretrained.check_same_tokens(tokenizer.get_vocab(), tokenizer_at(recipe, folder).get_vocab(), folder)
    return config_at(recipe, folder)


def _lengths(problems: Problems | None, tokenizer: PreTrainedTokenizerBase | None, attempt: Callable[..., Any]) -> tuple[int, ...]:
    if problems is None or tokenizer is None:
        return ()
    prompts = problems.train[:SAMPLED_PROMPTS]
    return attempt(lambda: tuple(len(chat.render(tokenizer, prompt.messages)) for prompt in prompts)) or ()


def _text_lengths(problems: Problems | None, tokenizer: PreTrainedTokenizerBase | None, hint: str) -> tuple[int, ...]:
    """Tokens of the texts that are learned from the data, or of its reference solutions, which a student's answers may come to resemble."""
    if problems is None or tokenizer is None:
        return ()
    texts = [prompt.hints[hint] for prompt in problems.train[:SAMPLED_PROMPTS] if prompt.hints.get(hint)]
    return tuple(len(chat.tokenize(tokenizer, text)) for text in texts)
