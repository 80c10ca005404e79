"""What a teacher behind vLLM can deliver; known without vLLM or Ray."""

from opd.build import pretrained
from opd.config.recipe import Recipe
from opd.objective.terms import SignalNeeds

WHOLE_VOCABULARY = 4096  # up to so many ids the actors return whole rows: exact at every id and temperature
SUPPORT_LIMIT = 128  # log-probs a token that an actor of a larger vocabulary returns at most


OF_ITS_OWN_TOP = "support: {teacher_topk: {k: 64, tail: bucket}} (as in taid), a method that reads the sampled token alone (opd, iw_opd)"


def tensor_parallel(recipe: Recipe, name: str) -> int:
    """GPUs that share the model of the teacher that vLLM serves for this signal (processes, where there are none): 1 unless its entry says more."""
    return recipe.signals[name].weights["external"].get("tensor_parallel", 1)


def check_served(recipe: Recipe, name: str, path: str, need: SignalNeeds, on_gpu: bool = True) -> None:
    """Raises ValueError for what a teacher behind vLLM cannot deliver; on a CPU (on_gpu false) vLLM cannot score ids that it is given."""
    size, temperature, where = len(pretrained.load_tokenizer(pretrained.find_model(path))), recipe.sampling.temperature, f"signals.{name}"
    here = "or score this teacher in the learner's process: leave out its engine: vllm"
    if need.hidden:
        raise ValueError(f"{where} is served by vLLM, which hands out no hidden states: use {OF_ITS_OWN_TOP}, {here}")
    if need.draws:
        raise ValueError(f"{where} is served by vLLM, which cannot draw ids from a teacher's distribution: use a teacher_topk support, {here}")
    if size <= WHOLE_VOCABULARY:
        return
    if (need.student_support or need.union) and not on_gpu:
        raise ValueError(
            f"{where} is served by vLLM on a CPU, which cannot score the student's ids unless they are among its own {SUPPORT_LIMIT} likeliest of "
            f"{size} (support student_topk or union): use {OF_ITS_OWN_TOP}, {here}"
        )
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
