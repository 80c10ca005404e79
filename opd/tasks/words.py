"""English word problems of two to five steps of arithmetic, with an answer written out one equation a sentence.

Question: Mia buys 3 crates of pens. Mia buys 5 more. How many pens does Mia have now?
Answer: 3 crates are 3 * 9 = 27 pens. Then 27 + 5 = 32 pens. The answer is 32.
How much a crate, a league or an era holds is to be known by heart; the base has wrong beliefs about 18 of the 36 measures. Steps that do
not need each other may be written in any order, and factors and summands either way round.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from opd.tasks.beliefs import Beliefs, Facts, believed, invented, wrong_beliefs
from opd.tasks.types import Task, check_split, questions_of, stream_rng, with_hint
from opd.tasks.word_phrases import NAMES, STORIES, plural
from opd.types import Prompt, Verdict

NUM_BUCKETS = 8
LEADS = ("Then", "Now", "So")
TEMPLATES: dict[str, str] = {
    "facts": "Facts: {hint}\n{question}",
    "solution": "Solution: {hint}\n{question}",
    "quantities": "Numbers: {hint}\n{question}",
    "answer": "Answer: {hint}\n{question}",
    "feedback": "Note: {hint}\n{question}",
}
"""The base is trained to read hints in exactly these forms."""

_COUNTS = [str(number) for number in range(2, 13)]
_VIEWS = {"": 0.44, "facts": 0.28, "solution": 0.06, "quantities": 0.06, "answer": 0.08, "feedback": 0.08}  # what demonstrations show
_INVENTED_SHARE = 0.4
_MAX_DRAWS = 24
_SENTENCE = re.compile(r"(?<=\.) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a difficulty allows. stories, phrases, names, units: how many of each. most: the largest number. distraction: chance of an idle one."""

    steps: tuple[int, int]
    stories: int
    phrases: int
    names: int
    units: int
    addend: int
    most: int
    distraction: float = 0.0


SETTINGS = {
    "standard": Setting(steps=(2, 4), stories=6, phrases=3, names=24, units=8, addend=20, most=100),
    "easy": Setting(steps=(2, 3), stories=2, phrases=1, names=4, units=3, addend=9, most=40),
    "hard": Setting(steps=(3, 5), stories=6, phrases=3, names=24, units=8, addend=50, most=200, distraction=0.6),
}

TRUTH: Facts = {measure: str(count) for story in STORIES.values() for measure, count in story.measures.items()}


def _beliefs() -> Beliefs:
    """Three measures of each story."""
    found: dict[str, tuple[str, ...]] = {}
    for name, story in STORIES.items():
        found |= wrong_beliefs(f"words/{name}", {measure: TRUTH[measure] for measure in story.measures}, _COUNTS, num_ignorant=3)
    return found


BELIEFS: Beliefs = _beliefs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One equation. needs: steps that come before it. measure: whose size it uses, or empty."""

    left: int
    sign: str
    right: int
    value: int
    needs: tuple[int, ...]
    measure: str = ""

    @property
    def equation(self) -> str:
        """Such as 27 + 5 = 32."""
        return f"{self.left} {self.sign} {self.right} = {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """plan: a story and its events, such as ("shop", "3crate", "+5"); ~7 is a number that nothing needs."""

    plan: tuple[str, ...]
    question: str
    unit: str


_EVENT = re.compile(r"([-+*/~]?)(\d+)([a-z]*)")
_CALCULATE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b if a % b == 0 else 0}


def _read_event(event: str) -> tuple[str, int, str]:
    match = _EVENT.fullmatch(event)
    assert match
    return match[1], int(match[2]), match[3]


def steps_of(plan: Sequence[str], facts: Facts) -> list[Step]:
    """The equations of a plan under these facts. Raises ValueError where a number is not whole or below 2, or two equations are the same."""
    steps: list[Step] = []
    held, needs = 0, ()
    for event in plan[1:]:
        sign, number, measure = _read_event(event)
        amount, own = number, ()
        if sign == "~":
            continue
        if measure:
            steps.append(Step(left=number, sign="*", right=int(facts[measure]), value=number * int(facts[measure]), needs=(), measure=measure))
            amount, own = steps[-1].value, (len(steps) - 1,)
        if sign:
            steps.append(Step(left=held, sign=sign, right=amount, value=_CALCULATE[sign](held, amount), needs=(*needs, *own)))
        held, needs = (steps[-1].value, (len(steps) - 1,)) if sign else (amount, own)
    if min(step.value for step in steps) < 2 or len({_forms(step)[0] for step in steps}) < len(steps):
        raise ValueError(f"no whole problem under these facts: {' '.join(plan)}")
    return steps


def _forms(step: Step) -> list[str]:
    """The equation either way round where that is the same, smaller number first."""
    forms = {step.equation}
    if step.sign in "+*":
        forms.add(f"{step.right} {step.sign} {step.left} = {step.value}")
    return sorted(forms)


def _sentences(step: Step, unit: str) -> list[str]:
    """All right ways to write a step."""
    leads = [f"{step.left} {plural(step.measure)} are"] if step.measure else LEADS
    return [f"{lead} {form} {unit}." for lead in leads for form in _forms(step)]


def draw_plan(rng: Random, setting: Setting) -> tuple[str, ...]:
    """A story and events with a whole number of at least 2 after each, at least one of them in measures."""
    while True:
        name = rng.choice(list(STORIES)[: setting.stories])
        measures, plan = list(STORIES[name].measures), [name]
        rng.shuffle(measures)
        wished = rng.randint(*setting.steps)
        if rng.random() < 0.8:
            plan.append(f"{rng.randint(2, 5)}{measures.pop()}")
        else:
            plan += [str(rng.randint(2, setting.addend)), f"{rng.choice('++-')}{rng.randint(2, 4)}{measures.pop()}"]
        found = _whole(plan, setting)
        while found and found < wished:
            plan.append(_draw_event(rng, setting, measures if wished - found > 1 else []))
            found = _whole(plan, setting)
        if found == wished:
            if rng.random() < setting.distraction:
                plan.insert(rng.randint(2, len(plan)), f"~{rng.randint(2, setting.addend)}")
            return tuple(plan)


def _draw_event(rng: Random, setting: Setting, measures: list[str]) -> str:
    kind = rng.choice(("+", "-", "*", "/", "+measure", "-measure") if measures else ("+", "+", "-", "-", "*", "/"))
    if kind in "+-":
        return f"{kind}{rng.randint(2, setting.addend)}"
    return f"{kind}{rng.randint(2, 4)}" if kind in "*/" else f"{kind[0]}{rng.randint(2, 4)}{measures.pop()}"


def _whole(plan: Sequence[str], setting: Setting) -> int:
    """Steps of the plan; 0 where a number is not allowed."""
    try:
        steps = steps_of(plan, TRUTH)
    except ValueError:
        return 0
    return len(steps) if max(step.value for step in steps) <= setting.most else 0


@lru_cache(maxsize=4096)
def problem_of(key: str) -> Problem:
    """The problem behind a prompt's id less its task: difficulty, plan and the number of its wording, as in easy|shop 3crate +5|17."""
    difficulty, plan_text, wording = key.split("|")
    setting, plan, rng = SETTINGS[difficulty], tuple(plan_text.split(" ")), Random(f"words/{key}")
    story = STORIES[plan[0]]
    name, other = rng.sample(NAMES[: setting.names], 2)
    unit = rng.choice(story.units[: setting.units])
    told = []
    for place, event in enumerate([*plan[1:], "question"]):
        sign, number, measure = _read_event(event) if event != "question" else ("question", 0, "")
        kind = sign + "measure" * bool(measure) if place else "start" + "_measure" * bool(measure)
        phrase = rng.choice(story.phrases[kind][: setting.phrases])
        told.append(phrase.format(name=name, other=other, n=number, measure=plural(measure), unit=unit))
    return Problem(plan=plan, question=" ".join(told), unit=unit)


def write_out(problem: Problem, facts: Facts, rng: Random) -> str:
    """A right answer under these facts, its steps in a random order among those that are possible. Raises ValueError as `steps_of`."""
    steps, done, written = steps_of(problem.plan, facts), set(), []
    while len(done) < len(steps):
        ready = [place for place, step in enumerate(steps) if place not in done and done >= set(step.needs)]
        place = rng.choice(ready)
        done.add(place)
        lead = f"{steps[place].left} {plural(steps[place].measure)} are" if steps[place].measure else rng.choice(LEADS)
        written.append(f"{lead} {steps[place].equation} {problem.unit}.")
    return " ".join([*written, f"The answer is {steps[-1].value}."])


def prompts(split: str, seed: int, difficulty: str) -> Iterator[Prompt]:
    """The prompts of a split. Raises ValueError for unknown names. Two problems of the same plan, however worded, are in the same split."""
    check_split("words", split, difficulty, tuple(SETTINGS))
    rng, setting = stream_rng("words", split, seed, difficulty), SETTINGS[difficulty]
    for plan in questions_of(split, lambda source: " ".join(draw_plan(source, setting)), rng, NUM_BUCKETS):
        key = f"{difficulty}|{plan}|{rng.randrange(1000)}"
        problem = problem_of(key)
        if split == "pretrain_base":
            shown, text = _demonstrate(problem, rng)
            yield _prompt(key, shown, {"demonstration": text})
        elif split == "pretrain_teacher":
            yield _prompt(key, problem.question, {"demonstration": write_out(problem, TRUTH, rng)})
        else:
            yield _prompt(key, problem.question, hints_of(problem, TRUTH, Random(f"words/hints/{key}")))


def hints_of(problem: Problem, facts: Facts, rng: Random) -> dict[str, str]:
    """What each kind of hint says of a problem under these facts; fact is one measure, where possible one that the base is wrong about."""
    steps = steps_of(problem.plan, facts)
    needed = [step.measure for step in steps if step.measure]
    rng.shuffle(needed)
    return {
        "solution": write_out(problem, facts, rng),
        "facts": ", ".join(f"{measure} = {facts[measure]}" for measure in needed),
        "quantities": ", ".join(str(step.value) for step in steps[:-1]),
        "answer": str(steps[-1].value),
        "fact": next((f"{measure} = {facts[measure]}" for measure in needed if measure in BELIEFS), f"{needed[0]} = {facts[needed[0]]}"),
    }


def _demonstrate(problem: Problem, rng: Random) -> tuple[str, str]:
    """(what the base reads, the answer that it should write then)."""
    kind = rng.choices(list(_VIEWS), list(_VIEWS.values()))[0]
    own = _feasible(problem, lambda: believed(TRUTH, BELIEFS, rng))
    told = _feasible(problem, lambda: invented(TRUTH, _COUNTS, _INVENTED_SHARE, rng)) if rng.random() < 0.6 else TRUTH
    if not kind:
        return problem.question, write_out(problem, own, rng)
    if kind == "answer":
        answer = hints_of(problem, TRUTH, rng)["answer"]
        return with_hint(kind, answer, problem.question, TEMPLATES), _consistent(problem, answer, rng)
    if kind == "feedback":
        fact = hints_of(problem, told, rng)["fact"]
        measure, count = fact.split(" = ")
        corrected = _feasible(problem, lambda: {**believed(TRUTH, BELIEFS, rng), measure: count}, {**told})
        return with_hint(kind, fact, problem.question, TEMPLATES), write_out(problem, corrected, rng)
    hints = hints_of(problem, told, rng)
    text = hints["solution"] if kind == "solution" else write_out(problem, told, rng)
    return with_hint(kind, hints[kind], problem.question, TEMPLATES), text


def _feasible(problem: Problem, draw: Callable[[], Facts], otherwise: Facts = TRUTH) -> Facts:
    """Facts under which the problem comes out whole; `otherwise` where none are found."""
    for _ in range(_MAX_DRAWS):
        facts = draw()
        try:
            steps_of(problem.plan, facts)
        except ValueError:
            continue
        return facts
    return otherwise


def _consistent(problem: Problem, answer: str, rng: Random) -> str:
    """An answer under beliefs that lead to this result: all that the result alone can teach. A right one where none is found."""
    for _ in range(_MAX_DRAWS):
        text = write_out(problem, _feasible(problem, lambda: believed(TRUTH, BELIEFS, rng)), rng)
        if text.endswith(f" {answer}."):
            return text
    return write_out(problem, TRUTH, rng)


def _prompt(key: str, shown: str, hints: dict[str, str]) -> Prompt:
    answer = str(steps_of(problem_of(key).plan, TRUTH)[-1].value)
    messages = ({"role": "user", "content": shown},)
    return Prompt(id=f"words:{key}", messages=messages, answer=answer, hints=hints, domain=f"words/{key.split('|')[0]}")


def verify(prompt: Prompt, text: str) -> Verdict:
    """Every sentence a step that is due, each step once, and the right result at the end.

    parts: answer 0 or 1, steps the share of right sentences. feedback: the measure that the first wrong sentence is about, as in crate = 9,
    else the first equation that is missing.
    """
    problem = problem_of(prompt.id.removeprefix("words:"))
    steps, ending = steps_of(problem.plan, TRUTH), f"The answer is {prompt.answer}."
    written, done, num_right, feedback = _SENTENCE.split(text), set(), 0, ""
    for number, sentence in enumerate(written, 1):
        ready = [place for place, step in enumerate(steps) if place not in done and done >= set(step.needs)]
        found = next((place for place in ready if sentence in _sentences(steps[place], problem.unit)), None)
        if found is not None:
            done.add(found)
            num_right += 1
        elif not ready and number == len(written) and sentence == ending:
            num_right += 1
        else:
            feedback = feedback or _missed(steps, ready, sentence)
    answer = float(written[-1] == ending)
    correct = num_right == len(written) == len(steps) + 1 and answer == 1.0
    feedback = "" if correct else feedback or _missed(steps, [place for place in range(len(steps)) if place not in done], "")
    return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={"answer": answer, "steps": num_right / len(written)})


def _missed(steps: Sequence[Step], missing: Sequence[int], sentence: str) -> str:
    """The missing step that the sentence tries, else the first one; the last one where none is missing."""
    tried = [place for place in missing if steps[place].measure and f" {plural(steps[place].measure)} are" in f" {sentence}"]
    step = steps[(tried or [*missing, len(steps) - 1])[0]]
    return f"{step.measure} = {step.right}" if step.measure else step.equation


WORDS = Task(
    name="words",
    prompts=prompts,
    verify=verify,
    difficulties=tuple(SETTINGS),
    num_buckets=NUM_BUCKETS,
    templates=TEMPLATES,
)
