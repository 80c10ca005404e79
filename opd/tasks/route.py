"""Walk from one place to another by way of a third, in a fixed world of 24 places with three exits each, learned by heart.

Question a>m>k: from a, by way of m, to k, in at most 8 moves. Answer 1f3m2k: each move's exit and the place that it leads to. Any such
walk is right. The base has wrong beliefs about 12 of the 72 exits.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

from opd.tasks.beliefs import Facts, believed, invented, wrong_beliefs
from opd.tasks.types import HINT_CHARACTERS, Task, check_split, questions_of, stream_rng, with_hint
from opd.types import Prompt, Verdict

PLACES = "abcdefghijklmnopqrstuvwx"
EXITS = "123"
NUM_BUCKETS = 6
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
BELIEFS = wrong_beliefs("route", TRUTH, PLACES, num_ignorant=12)
_DISTANCES = {goal: distances_to(goal, TRUTH) for goal in PLACES}

_VIEWS = {"": 0.45, "facts": 0.33, "solution": 0.07, "answer": 0.10, "feedback": 0.05}  # what the base's demonstrations show
_INVENTED_SHARE = 0.3
_MAX_DRAWS = 24
_DIRECT_SHARE = 0.35  # demonstrations of a>k, with no place between, from which planning is learned sooner


def shortest_moves(question: str) -> int:
    """Moves of the shortest right walk."""
    stops = question.split(">")
    return sum(_DISTANCES[goal][start] for start, goal in pairwise(stops))


def walk(question: str, world: Facts, rng: Random) -> str | None:
    """A shortest walk in this world, drawn at random among equals at each fork; None where there is none."""
    legs = [_leg(start, goal, world, rng) for start, goal in pairwise(question.split(">"))]
    return None if None in legs else "".join(legs)


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


def draw_question(rng: Random, num_moves: tuple[int, int], num_stops: int = 3) -> str:
    """Different places, the shortest walk within these bounds."""
    while True:
        question = ">".join(rng.sample(PLACES, num_stops))
        if num_moves[0] <= shortest_moves(question) <= num_moves[1]:
            return question


def facts_hint(used: Sequence[str], world: Facts, rng: Random, max_spare: int = 0) -> str:
    """The exits that a walk uses, each once, and up to `max_spare` others, shuffled: f3m,a1f."""
    keys = list(dict.fromkeys(used))
    if max_spare:
        keys += [key for key in rng.sample(sorted(TRUTH), rng.randint(0, max_spare)) if key not in keys]
    shown = [key + world[key] for key in keys]
    rng.shuffle(shown)
    return ",".join(shown)


def prompts(split: str, seed: int, difficulty: str) -> Iterator[Prompt]:
    """The prompts of a split. Raises ValueError for unknown names."""
    check_split("route", split, difficulty, tuple(NUM_MOVES))
    rng = stream_rng("route", split, seed, difficulty)

    def draw(source: Random) -> str:
        direct = split.startswith("pretrain") and source.random() < _DIRECT_SHARE
        return draw_question(source, (1, 4), 2) if direct else draw_question(source, NUM_MOVES[difficulty])

    for question in questions_of(split, draw, rng, NUM_BUCKETS):
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
    used = exits_of(question, text)
    needed = next((key for key in used if key in BELIEFS), used[0])
    return {"solution": text, "facts": facts_hint(used, TRUTH, rng), "answer": text[0::2], "fact": needed + TRUTH[needed]}


def _demonstrate(question: str, rng: Random) -> tuple[str, str]:
    """(what the base reads, the walk that it should write then)."""
    kind = rng.choices(list(_VIEWS), list(_VIEWS.values()))[0]
    own = believed(TRUTH, BELIEFS, rng)
    if kind in ("facts", "solution"):
        told = invented(TRUTH, PLACES, _INVENTED_SHARE, rng) if rng.random() < 0.5 else TRUTH
        text = walk(question, told, rng)
        if text is None or len(text) > 2 * MAX_MOVES:
            told, text = TRUTH, _true_walk(question, rng)
        hint = text if kind == "solution" else facts_hint(exits_of(question, text), told, rng, max_spare=1)
        return with_hint(kind, hint, question), text
    if kind == "answer":
        text = _true_walk(question, rng)
        return with_hint(kind, text[0::2], question), _follow(question, text, rng)
    if kind == "feedback":
        used = exits_of(question, _own_walk(question, own, rng))
        key = next((key for key in used if own[key] != TRUTH[key]), rng.choice(used))
        return with_hint(kind, key + TRUTH[key], question), _own_walk(question, {**own, key: TRUTH[key]}, rng)
    return question, _own_walk(question, own, rng)


def _own_walk(question: str, world: Facts, rng: Random) -> str:
    """The base's walk: exits chosen as the true map has it, the places behind them named as believed, and on from there."""
    for _ in range(_MAX_DRAWS):
        place, text = question[0], ""
        for goal in question.split(">")[1:]:
            while place != goal and len(text) < 2 * MAX_MOVES:
                exit_ = rng.choice(_nearer(place, goal))
                place = world[place + exit_]
                text += exit_ + place
        if place == question[-1]:
            return text
    return _true_walk(question, rng)


def _nearer(place: str, goal: str) -> list[str]:
    distance = _DISTANCES[goal]
    return [exit_ for exit_ in EXITS if distance[TRUTH[place + exit_]] < distance[place]]


def _follow(question: str, text: str, rng: Random) -> str:
    """The given moves in a world of beliefs where they lead by way of the one place to the other; the true places where none is found."""
    for _ in range(_MAX_DRAWS):
        world, place, written = believed(TRUTH, BELIEFS, rng), question[0], ""
        for exit_ in text[0::2]:
            place = world[place + exit_]
            written += exit_ + place
        if _arrives(question, question[0] + written[1::2]):
            return written
    return text


def _prompt(shown: str, question: str, difficulty: str, hints: dict[str, str]) -> Prompt:
    answer = hints.get("answer") or _true_walk(question, Random(0))[0::2]
    messages = ({"role": "user", "content": shown},)
    return Prompt(id=f"route:{question}", messages=messages, answer=answer, hints=hints, domain=f"route/{difficulty}")


def _stops_ahead(question: str, visited: str) -> list[str]:
    """The stops of the question that these places, in order, have not reached yet."""
    stops = question.split(">")
    for place in visited:
        if stops and place == stops[0]:
            stops.pop(0)
    return stops


def _arrives(question: str, visited: str) -> bool:
    return not _stops_ahead(question, visited) and visited[-1] == question[-1]


_WALK = re.compile(rf"(?:[{EXITS}][{PLACES}])+")


def verify(prompt: Prompt, text: str) -> Verdict:
    """The moves lead to the goal by way of the place between, and each place on the way is named rightly; any such walk counts.

    parts: answer 0 or 1 (the moves alone), steps the share of right steps. feedback: the first exit that was misremembered, or the next
    one of a right walk from where the moves led.
    """
    question = prompt.id.removeprefix("route:")
    if not _WALK.fullmatch(text):
        return Verdict(feedback=_next_exit(question, question[0]), parts={"answer": 0.0, "steps": 0.0})
    visited, claimed, num_right, misremembered = question[0], question[0], 0, ""
    for exit_, named in zip(text[0::2], text[1::2], strict=True):
        if TRUTH[claimed + exit_] == named:
            num_right += 1
        else:
            misremembered = misremembered or claimed + exit_ + TRUTH[claimed + exit_]
        claimed = named
        visited += TRUTH[visited[-1] + exit_]
    num_moves = len(text) // 2
    answer = float(_arrives(question, visited) and num_moves <= MAX_MOVES)
    correct = num_right == num_moves and answer == 1.0
    feedback = "" if correct else misremembered or _next_exit(question, visited if num_moves < MAX_MOVES else question[0])
    return Verdict(reward=float(correct), correct=correct, feedback=feedback, parts={"answer": answer, "steps": num_right / num_moves})


def _next_exit(question: str, visited: str) -> str:
    """The first exit of a shortest walk on from here; from the start where the walk has passed its goal."""
    ahead = _stops_ahead(question, visited)
    place, toward = (visited[-1], ahead[0]) if ahead else (question[0], question.split(">")[1])
    key = place + _nearer(place, toward)[0]
    return key + TRUTH[key]


ROUTE = Task(
    name="route",
    prompts=prompts,
    verify=verify,
    characters=PLACES + EXITS + ">," + HINT_CHARACTERS,
    difficulties=tuple(NUM_MOVES),
    num_buckets=NUM_BUCKETS,
)
