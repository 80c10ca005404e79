"""What is asked and how: the problems of a public suite or of a recipe's data, with verifier, votes and sampling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.build.problems import load_problems
from opd.config.recipe import Recipe
from opd.data.published import Published, find_published, published_for
from opd.data.suites import find_suite, suite_records
from opd.examination.options import SuiteOptions
from opd.prompts import read_prompts
from opd.types import Prompt, Verifier
from opd.verify import final_answer, make_verifier, read_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How answers are drawn. max_tokens: None for as many as the model has positions left, up to `published`'s."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    samples: int
    max_tokens: int | None
    published: Published | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """votes: the answer that maj@k counts, "" for none. longest: prompts above so many tokens are refused."""

    suite: str
    split: str
    prompts: Sequence[Prompt]
    verify: Verifier
    votes: Callable[[Prompt, str], str] = final_answer
    decodings: Sequence[Decoding]
    thinking: bool | None = None
    notes: Sequence[str] = ()


def suite_exam(name: str, wish: SuiteOptions, model: str, generation_config: Mapping[str, Any]) -> Exam:
    """A public suite, or a local file of its shape. Raises ValueError for an unknown name and for problems that cannot be read or graded."""
    suite = find_suite(name)
    published = published_for(model, wish.thinking, generation_config) if wish.sampling == "auto" else find_published(wish.sampling)
    settings = published if wish.max_tokens is None else replace(published, max_tokens=wish.max_tokens)
    given = {key: value for key, value in (("temperature", wish.temperature), ("top_p", wish.top_p), ("top_k", wish.top_k)) if value is not None}
    settings = replace(settings, **given)
    if given:
        settings = replace(settings, source=f"{published.source}; changed here: {', '.join(given)}")
    samples = wish.samples or suite.samples
    if settings.temperature == 0 and wish.samples > 1:
        raise ValueError(f"suite.samples is {wish.samples}, but greedy answers are all the same: use suite.samples=1, or a temperature above 0")
    decoding = Decoding(
        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, samples=samples if settings.temperature else 1,
        max_tokens=wish.max_tokens, published=settings,
    )  # fmt: skip
    verify = make_verifier(suite.data.verifier)
    records = suite_records(suite, path=wish.path, subset=wish.subset, split=wish.split, limit=wish.problems)
    prompts = read_prompts(records, verify=verify, origin=f"suite {name}", same_texts=True)[0]
    notes = []
    if not wish.problems and len(prompts) != suite.problems:
        notes.append(f"{name}: {len(prompts)} problems, where the public suite has {suite.problems}: not comparable with published numbers")
    if wish.problems:
        notes.append(f"{name}: the first {len(prompts)} of {suite.problems} problems: not comparable with published numbers")
    return Exam(
        suite=name, split=wish.split or suite.data.split, prompts=prompts, verify=verify, votes=read_answer(suite.data.verifier),
        decodings=[decoding], thinking=wish.thinking, notes=notes,
    )  # fmt: skip


def recipe_exam(recipe: Recipe, split: str) -> Exam:
    """The recipe's own problems at its evaluation temperatures."""
    problems, ev = load_problems(recipe, None), recipe.eval
    prompts = {"train": problems.train, "dev": problems.dev, "test": problems.test}[split]
    decodings = [Decoding(temperature=t, samples=ev.final_samples, max_tokens=recipe.sampling.max_tokens) for t in ev.temperatures]
    return Exam(
        suite=problems.suite, split=split, prompts=prompts, verify=problems.verify, decodings=decodings, thinking=recipe.data.thinking,
        notes=problems.notes,
    )  # fmt: skip
