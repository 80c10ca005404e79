"""Walk from one place to another by way of a third, in a fixed world of 24 places with three exits each, learned by heart.

Question a>m>k: from a, by way of m, to k, in at most 8 moves. Answer 1f3m2k: each move's exit and the place that it leads to. Any such
walk is right. The base has wrong beliefs about 15 of the 72 exits.
"""

import re
from collections.abc import Iterator, Sequence
from random import Random

from opd.tasks.beliefs import Facts, believed, invented, wrong_beliefs
from opd.tasks.types import HINT_CHARACTERS, Task, check_split, questions_of, stream_rng, with_hint
from opd.types import Prompt, Verdict

PLACES = "abcdefghijklmnopqrstuvwx"
EXITS = "123"
MAX_MOVES = 8
NUM_MOVES = {"standard": (3, 5), "easy": (2, 4), "hard": (5, 7)}  # of the shortest walk


def _world() -> dict[str, str]:
    rng = Random("route/world")
    while True:
        world = {}
        for place in PLACES:
            for exit_, leads_to in zip(EXITS, rng.sample([p for p in PLACES if p != place], len(EXITS)), strict=True):
                world[place + exit_] = leads_to
        if all(len(distances_to(goal, world)) == len(PLACES) for goal in PLACES):
            return world


def distances_to(goal: str, world: Facts) -> dict[str, int]:
    """Moves from every place that can reach the goal."""
    enters: dict[str, list[str]] = {}
    for key, leads_to in world.items():
        enters.setdefault(leads_to, []).append(key[0])
    distance, frontier = {goal: 0}, [goal]
    while frontier:
        found = [origin for place in frontier for origin in enters.get(place, ()) if origin not in distance]
        distance.update({origin: distance[place] + 1 for place in frontier for origin in enters.get(place, ()) if origin not in distance})
        frontier = list(dict.fromkeys(found))
    return distance


TRUTH: Facts = _world()
BELIEFS = wrong_beliefs("route", TRUTH, PLACES, num_ignorant=15)
_DISTANCES = {goal: distances_to(goal, TRUTH) for goal in PLACES}

_VIEWS = {"": 0.50, "facts": 0.28, "solution": 0.07, "answer": 0.10, "feedback": 0.05}  # what the base's demonstrations show
_INVENTED_SHARE = 0.3


def shortest_moves(question: str) -> int:
    """Moves of the shortest right walk."""
    start, via, goal = question.split(">")
    return _DISTANCES[via][start] + _DISTANCES[goal][via]


def walk(question: str, world: Facts, rng: Random) -> str | None:
    """A shortest walk in this world, drawn at random among equals at each fork; None where there is none."""
    start, via, goal = question.split(">")
    first = _leg(start, via, world, rng)
    second = None if first is None else _leg(via, goal, world, rng)
    return None if first is None or second is None else first + second


def _leg(start: str, goal: str, world: Facts, rng: Random) -> str | None:
    distance = _DISTANCES[goal] if world is TRUTH else distances_to(goal, world)
    place, text = start, ""
    while place != goal:
        nearest = distance.get(place, 0) - 1
        exits = [exit_ for exit_ in EXITS if nearest >= 0 and distance.get(world.get(place + exit_, ""), -1) == nearest]
        if not exits:
            return None
        exit_ = rng.choice(exits)
        place = world[place + exit_]
        text += exit_ + place
    return text


def exits_of(question: str, text: str) -> list[str]:
    """The facts that a walk uses, as keys: question a>m>k, walk 1f3m gives a1, f3."""
    places = question[0] + text[1::2]
    return [place + exit_ for place, exit_ in zip(places, text[0::2], strict=False)]


def draw_question(rng: Random, num_moves: tuple[int, int]) -> str:
    """Three different places, the shortest walk within these bounds."""
    while True:
        question = ">".join(rng.sample(PLACES, 3))
        if num_moves[0] <= shortest_moves(question) <= num_moves[1]:
            return question


def facts_hint(used: Sequence[str], world: Facts, rng: Random) -> str:
    """The exits that a walk uses and sometimes another, shuffled: f3m,a1f,q2c."""
    needed = list(dict.fromkeys(used))
    others = [key for key in rng.sample(sorted(TRUTH), rng.randrange(2)) if key not in needed]
    shown = [key + world[key] for key in needed + others]
    rng.shuffle(shown)
    return ",".join(shown)


def prompts(split: str, seed: int, difficulty: str) -> Iterator[Prompt]:
    """The prompts of a split. Raises ValueError for unknown names."""
    check_split("route", split, difficulty, tuple(NUM_MOVES))
    rng = stream_rng("route", split, seed, difficulty)
    for question in questions_of(split, lambda source: draw_question(source, NUM_MOVES[difficulty]), rng):
        if split == "pretrain_base":
            shown, text = _demonstrate(question, rng)
            yield _prompt(shown, question, difficulty, {"demonstration": text})
        elif split == "pretrain_teacher":
            yield _prompt(question, question, difficulty, {"demonstration": _true_walk(question, rng)})
        else:
            yield _prompt(question, question, difficulty, _hints(question))


def _true_walk(question: str, rng: Random) -> str:
    text = walk(question, TRUTH, rng)
    assert text is not None
    return text


def _hints(question: str) -> dict[str, str]:
    rng = Random(f"route/hints/{question}")
    text = _true_walk(question, rng)
    return {"solution": text, "facts": facts_hint(exits_of(question, text), TRUTH, rng), "answer": text[0::2]}


def _demonstrate(question: str, rng: Random) -> tuple[str, str]:
    """(what the base reads, the walk that it should write then)."""
    kind = rng.choices(list(_VIEWS), list(_VIEWS.values()))[0]
    own = believed(TRUTH, BELIEFS, rng)
    if kind in ("facts", "solution"):
        told = invented(TRUTH, PLACES, _INVENTED_SHARE, rng) if rng.random() < 0.5 else TRUTH
        text = walk(question, told, rng)
        if text is None or len(text) > 2 * MAX_MOVES:
            told, text = TRUTH, _true_walk(question, rng)
        hint = text if kind == "solution" else facts_hint(exits_of(question, text), told, rng)
        return with_hint(kind, hint, question), text
    if kind == "answer":
        text = _true_walk(question, rng)
        return with_hint(kind, text[0::2], question), _follow(question, text, rng)
    if kind == "feedback":
        key = rng.choice(exits_of(question, _true_walk(question, rng)))
        return with_hint(kind, key + TRUTH[key], question), _own_walk(question, {**own, key: TRUTH[key]}, rng)
    return question, _own_walk(question, own, rng)


def _own_walk(question: str, world: Facts, rng: Random) -> str:
    return walk(question, world, rng) or _true_walk(question, rng)


def _follow(question: str, text: str, rng: Random) -> str:
    """The given moves in a world of beliefs where they lead by way of the one place to the other; the true places where none is found."""
    _, via, goal = question.split(">")
    for _ in range(24):
        world, place, written = believed(TRUTH, BELIEFS, rng), question[0], ""
        for exit_ in text[0::2]:
            place = world[place + exit_]
            written += exit_ + place
        if place == goal and via in written:
            return written
    return text


def _prompt(shown: str, question: str, difficulty: str, hints: dict[str, str]) -> Prompt:
    answer = hints.get("answer") or _true_walk(question, Random(0))[0::2]
    messages = ({"role": "user", "content": shown},)
    return Prompt(id=f"route:{question}", messages=messages, answer=answer, hints=hints, domain=f"route/{difficulty}")


_WALK = re.compile(rf"(?:[{EXITS}][{PLACES}])+")


def verify(prompt: Prompt, text: str) -> Verdict:
    """The moves lead to the goal by way of the place between, and every place on the way is named rightly; other walks than the reference count.

    parts: answer 0 or 1 (the moves alone), steps the share of right steps. feedback: the first exit that was misremembered, or the next
    one of a right walk from where the moves really led.
    """
    question = prompt.id.removeprefix("route:")
    start, via, goal = question.split(">")
    if not _WALK.fullmatch(text):
        return Verdict(feedback=_next_exit(start, via, goal), parts={"answer": 0.0, "steps": 0.0})
    place, visited, claimed = start, [start], start
    num_right, feedback = 0, ""
    for exit_, named in zip(text[0::2], text[1::2], strict=True):
        if TRUTH[claimed + exit_] == named:
            num_right += 1
        else:
            feedback = feedback or claimed + exit_ + TRUTH[claimed + exit_]
        claimed, place = named, TRUTH[place + exit_]
        visited.append(place)
    num_moves = len(visited) - 1
    answer = float(place == goal and via in visited and num_moves <= MAX_MOVES)
    correct = num_right == num_moves and answer == 1.0
    if not correct and not feedback:
        ahead = (place, goal) if via in visited else (place, via)
        feedback = _next_exit(start, via, goal) if num_moves >= MAX_MOVES or ahead[0] == ahead[1] else _next_exit(*ahead, goal)
    parts = {"answer": answer, "steps": num_right / num_moves}
    return Verdict(reward=float(correct), correct=correct, feedback="" if correct else feedback, parts=parts)


def _next_exit(place: str, via: str, goal: str) -> str:
    toward = goal if place == via else via
    key = next(place + exit_ for exit_ in EXITS if _DISTANCES[toward][TRUTH[place + exit_]] < _DISTANCES[toward][place])
    return key + TRUTH[key]


ROUTE = Task(
    name="route", prompts=prompts, verify=verify, characters=PLACES + EXITS + ">," + HINT_CHARACTERS, difficulties=tuple(NUM_MOVES)
)
