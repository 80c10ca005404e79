"""Engines in actors, as far as nothing of Ray is needed."""

import pytest
import torch
from opd_rollout.dispatch import ActorsLost

from opd.build import actors
from opd.config.load import parse_recipe
from opd.errors import RunFailed
from opd.launcher.ranks import ALONE


def lost(*_):
    raise ActorsLost("every actor is gone; run the same command again")


def test_actors_that_are_lost_before_the_run_begins_end_it_with_a_sentence(monkeypatch):
    monkeypatch.setattr(actors, "address_of", lost)
    recipe, model = parse_recipe({}), torch.nn.Module()
    model.config = None
    with pytest.raises(RunFailed, match="every actor is gone; run the same command again"):
        actors.student_engine(recipe, {}, model, {}, None, 64, [], (), None, ALONE)
    with pytest.raises(RunFailed, match="every actor is gone; run the same command again"):
        actors.served_teachers(recipe, {}, {}, [], None)
