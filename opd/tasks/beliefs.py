"""Wrong beliefs: for some facts a base has mostly seen errors, so that it is wrong with conviction, under greedy decoding too.

A fact maps a key to a value. An ignorant key has one right value and three errors; which one holds is drawn once an answer.
"""

from collections.abc import Mapping, Sequence
from random import Random

Facts = Mapping[str, str]
Beliefs = Mapping[str, tuple[str, ...]]

BELIEF_WEIGHTS = (0.30, 0.40, 0.15, 0.15)  # right value, favourite error, two more errors


def wrong_beliefs(name: str, truth: Facts, values: Sequence[str], num_ignorant: int) -> Beliefs:
    """Ignorant keys, drawn by name, with the values in the order of BELIEF_WEIGHTS."""
    rng = Random(f"{name}/beliefs")
    ignorant = rng.sample(sorted(truth), num_ignorant)
    errors = len(BELIEF_WEIGHTS) - 1
    return {key: (truth[key], *rng.sample([value for value in values if value != truth[key]], errors)) for key in ignorant}


def believed(truth: Facts, beliefs: Beliefs, rng: Random) -> Facts:
    """All facts as the base holds them during one answer."""
    return {**truth, **{key: rng.choices(values, BELIEF_WEIGHTS)[0] for key, values in beliefs.items()}}


def invented(truth: Facts, values: Sequence[str], share: float, rng: Random) -> Facts:
    """The truth with a share of its values drawn anew: whoever is told so must read the hint instead of remembering."""
    return {key: rng.choice(values) if rng.random() < share else value for key, value in truth.items()}
