"""What is minimised: terms made of small pure functions, one global denominator each; torch only."""

from opd.objective.compose import EVERY_TOKEN, denominators, length_field, rows_to_tensors, token_loss, token_weight
from opd.objective.findings import Setting
from opd.objective.join import group_outcome, join
from opd.objective.meters import meters
from opd.objective.parse import build_objective
from opd.objective.routes import RouteInput
from opd.objective.supports import Support
from opd.objective.terms import Needs, Objective, Reduction, SignalNeeds, Term
from opd.objective.weights import TokenStatistics

__all__ = [
    "EVERY_TOKEN",
    "Needs",
    "Objective",
    "Reduction",
    "RouteInput",
    "Setting",
    "SignalNeeds",
    "Support",
    "Term",
    "TokenStatistics",
    "build_objective",
    "denominators",
    "group_outcome",
    "join",
    "length_field",
    "meters",
    "rows_to_tensors",
    "token_loss",
    "token_weight",
]
