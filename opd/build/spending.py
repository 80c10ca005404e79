"""What a recipe says about spending, as the values that a run counts with."""

from opd.config.recipe import Recipe
from opd.run.spending import Rates


def rates_of(recipe: Recipe) -> Rates:
    """The recipe's prices."""
    return Rates(**recipe.prices.model_dump(exclude={"devices"}))


def num_devices(recipe: Recipe) -> int:
    """Devices that a run holds: `prices.devices`, else one a learner rank, those of vLLM actors of their own, those of served teachers."""
    from_files = isinstance(recipe.rollout.source, dict) and "dataset" in recipe.rollout.source  # teachers whose scores are all on file are not there
    signals = [signal for signal in recipe.signals.values() if not (signal.scores and from_files)]
    external = [weights.get("external") for signal in signals if isinstance(weights := signal.weights, dict)]
    served = sum(found.get("tensor_parallel", 1) for found in external if isinstance(found, dict) and found.get("engine") == "vllm")
    apart = recipe.engine.kind == "vllm" and recipe.engine.placement == "separate"
    engine = recipe.engine.replicas * recipe.engine.tensor_parallel if apart else 0
    return recipe.prices.devices or recipe.launch.nodes * recipe.learner.ranks + engine + served
