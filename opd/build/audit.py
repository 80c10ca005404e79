"""The check at a run's start that the engine and the learner mean the same by a log-probability."""

from opd_rollout.parity import audit
from opd_rollout.sampling import request_seed
from opd_rollout.types import GenerateRequest, Sampling

from opd.build.system import Parts
from opd.config.recipe import Recipe
from opd.run.live import LiveView

AUDIT_PROMPTS = 4


def audit_engine(recipe: Recipe, parts: Parts, view: LiveView) -> None:
    """Compare the engine's log-probs with the learner's, in nats; ValueError past the recipe's threshold."""
    if route := getattr(parts.engine, "route", ""):
        view.say(route)
    prompts = list(parts.problems.dev[:AUDIT_PROMPTS])
    if not prompts:
        view.say("engine against learner: not compared, for there are no dev problems (eval.num_problems)")
        return
    requests = [GenerateRequest(prompt_ids=parts.encode(p), seed=request_seed(recipe.seed, p.id, 0, 0)) for p in prompts]
    sampling = Sampling(temperature=recipe.sampling.temperature, max_tokens=recipe.sampling.max_tokens, stop_ids=parts.stop_ids)
    gap = audit(parts.engine, lambda asked, _temperature: parts.learner.teacher_pass(asked, "live"), requests, sampling)
    if not gap.mean <= recipe.engine.audit_nats:  # NaN, of a model with broken weights, must not pass
        raise ValueError(
            f"engine and learner disagree on log-probs by {gap.mean:.4f} nats on average (largest {gap.max:.4f}) over {gap.num_tokens} tokens, more "
            f"than engine.audit_nats={recipe.engine.audit_nats}: training would be off-policy. Use float32, or raise the threshold knowingly."
        )
    view.say(f"engine against learner: {gap.mean:.1e} nats mean, {gap.max:.1e} largest, over {gap.num_tokens} tokens")
