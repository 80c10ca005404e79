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
    """votes: the answer that maj@k counts, "" for none. left_out: problems that nobody can be examined on, since their gold answer is refused."""

    suite: str
    split: str
    prompts: Sequence[Prompt]
    verify: Verifier
    votes: Callable[[Prompt, str], str] = final_answer
    decodings: Sequence[Decoding]
    thinking: bool | None = None
    notes: Sequence[str] = ()
    left_out: int = 0


UNFIT = frozenset({"ungradable", "incomplete"})
"""Records of a public suite, which nobody here can mend, that are left out and counted."""

MOST_LEFT_OUT = 0.1
"""Share of a suite's problems above which the file or the verifier is the wrong one, and nothing is generated."""


def unfit_notes(name: str, left_out: Sequence[str], number: int) -> list[str]:
    """What the user is told of problems that were left out. Raises ValueError for more than MOST_LEFT_OUT of them."""
    if not left_out:
        return []
    listed = "\n  ".join(sentence.partition("; mend")[0] for sentence in left_out)
    if len(left_out) > MOST_LEFT_OUT * number:
        raise ValueError(
            f"suite {name}: {len(left_out)} of {number} problems have no gold answer that the suite's own verifier accepts; this is not the suite's "
            f"data, or the file is damaged:\n  {listed}"
        )
    return [
        f"{name}: {len(left_out)} of {number} problems are left out, since the suite's own verifier refuses their gold answer: not comparable with "
        f"published numbers over all\n  {listed}"
    ]


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
    prompts, dropped = read_prompts(records, verify=verify, repair=UNFIT, origin=f"suite {name}", same_texts=True)
    left_out = [sentence for found in dropped.values() for sentence in found]
    notes = unfit_notes(name, left_out, len(prompts) + len(left_out))
    if not left_out and not wish.problems and len(prompts) != suite.problems:
        notes.append(f"{name}: {len(prompts)} problems, where the public suite has {suite.problems}: not comparable with published numbers")
    if wish.problems:
        notes.append(f"{name}: the first {len(prompts)} of {suite.problems} problems: not comparable with published numbers")
    return Exam(
        suite=name, split=wish.split or suite.data.split, prompts=prompts, verify=verify, votes=read_answer(suite.data.verifier),
        decodings=[decoding], thinking=wish.thinking, notes=notes, left_out=len(left_out),
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
