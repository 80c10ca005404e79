"""What a teacher behind vLLM can deliver; known without vLLM or Ray."""

from opd.build import pretrained
from opd.config.recipe import Recipe
from opd.objective.terms import SignalNeeds

WHOLE_VOCABULARY = 4096  # up to so many ids the actors return whole rows: exact at every id and temperature
SUPPORT_LIMIT = 128  # log-probs a token that an actor of a larger vocabulary returns at most


def check_served(recipe: Recipe, name: str, path: str, need: SignalNeeds) -> None:
    """Raises ValueError for what a teacher behind vLLM cannot deliver."""
    size, temperature, where = len(pretrained.load_tokenizer(pretrained.find_model(path))), recipe.sampling.temperature, f"signals.{name}"
    here = "or score this teacher in the learner's process: leave out its engine: vllm"
    if need.hidden:
        raise ValueError(f"{where} is served by vLLM, which hands out no hidden states: use a teacher_topk or student_topk support, {here}")
    if need.draws:
        raise ValueError(f"{where} is served by vLLM, which cannot draw ids from a teacher's distribution: use a teacher_topk support, {here}")
    if size <= WHOLE_VOCABULARY:
        return
    if need.entropy:
        raise ValueError(
            f"{where} is served by vLLM, which hands out the {SUPPORT_LIMIT} most likely of its {size} ids, and a weight or field of the objective "
            f"reads its entropy, which needs all (up to {WHOLE_VOCABULARY} ids it is exact): use another weight, {here}"
        )
    if temperature != 1:
        raise ValueError(
            f"{where} is served by vLLM, which scores {size} ids at temperature 1, and sampling.temperature is {temperature}: use "
            f"sampling.temperature=1, {here}"
        )
    k = max(need.k, need.union)
    if k > SUPPORT_LIMIT:
        raise ValueError(f"{where} is served by vLLM, which hands out {SUPPORT_LIMIT} log-probs a token at most, not k={k}: lower k, {here}")
