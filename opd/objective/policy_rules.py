"""Rules for terms that learn from sampled tokens: who sampled them, what their advantage is, what corrects it. See legality.py."""

from opd.config.choices import name_of, parameters_of, what_it_reads
from opd.objective.findings import Finding, Setting
from opd.objective.terms import Term


def off_policy_has_a_ratio(term: Term, setting: Setting) -> Finding | None:
    if setting.sampled_in is None or term.kind != "surrogate" or term.context == setting.sampled_in:
        return None
    if term.reads & {"old_logp"} or any("behaviour_logp" in what_it_reads(weight) for weight in term.weights):
        return None
    return Finding(
        reason=f"answers are sampled under the view of {setting.sampled_in!r}, and this term learns in another context without a ratio between them",
        legal="policy: ppo_clip | sequence_clip | cispo, weight: sampler_ratio, or context: " + setting.sampled_in,
    )


def penalty_in_the_reward(term: Term, setting: Setting) -> Finding | None:
    kinds = [kind for kind in (parameters_of(function).get("kind") for function in term.shape) if kind in ("k2", "k3")]
    if not kinds:
        return None
    return Finding(
        reason=f"{kinds[0]} inside the reward is another objective than the KL: its policy gradient is not that of the reverse KL",
        legal="kl_penalty: {kind: k1}, or a term reference_kl: k2",
        allow=f"{kinds[0]}_reward",
    )


def regression_has_a_target(term: Term, setting: Setting) -> Finding | None:
    regresses = term.loss is not None and "target_logp" in what_it_reads(term.loss)
    if regresses == any("target_logp" in what_it_reads(function) for function in term.token_credits):
        return None
    return Finding(
        reason="squared_error comes near to a log-probability, which advantages are not; curious_teacher gives one, and is no advantage",
        legal="policy: squared_error with advantage: {curious_teacher: {}}; another policy with another advantage",
    )


def sampled_by_the_policy(term: Term, setting: Setting) -> Finding | None:
    if setting.source in (None, "student") or (setting.source == "mixed" and name_of(term.route) == "from_student"):
        return None
    if term.credit is not None and "own_logp" in term.reads:  # compares answers, whoever wrote them
        return None
    if "target_logp" in term.reads:  # a regression at the data's tokens
        return None
    sampled = term.kind == "surrogate" or (term.support is not None and term.support.kind == "sampled")
    ratio = term.reads & {"old_logp", "behaviour_logp"}
    if not sampled and not ratio:
        return None
    return Finding(
        reason=(
            f"answers from the source {setting.source!r} carry no log-probs of a policy that sampled them, so "
            f"{'a ratio' if ratio else 'an estimate over sampled tokens'} means nothing on them"
        ),
        legal=(
            "rollout.source: student; route: from_student where the source is mixed; or nll, or distill on full | student_topk | teacher_topk "
            "without a ratio weight"
        ),
    )


def drawn_with_a_teacher(term: Term, setting: Setting) -> Finding | None:
    sampled = term.kind == "surrogate" or (term.support is not None and term.support.kind == "sampled")
    corrected = any(name_of(weight) in ("sampler_ratio", "engine_ratio") for weight in term.weights)
    if not setting.sampler or not sampled or corrected:
        return None
    return Finding(
        reason="rollout.sampler lets a teacher draw tokens, so an estimate over sampled tokens is not one under the student",
        legal="weight: sampler_ratio or engine_ratio on the term; rollout.sampler: student; or a divergence on full | student_topk | teacher_topk",
    )


def stale_answers_are_corrected(term: Term, setting: Setting) -> Finding | None:
    sampled = term.kind == "surrogate" or (term.support is not None and term.support.kind == "sampled")
    corrected = any("behaviour_logp" in what_it_reads(function) for function in (*term.weights, *term.fields))
    if not (setting.max_staleness or setting.max_age) or not sampled or corrected:
        return None
    age, key, off = (
        (f"{setting.max_age} steps", "rollout.replay", "no rollout.replay")
        if setting.max_age
        else (f"{setting.max_staleness} versions", "asynchrony.max_staleness", "asynchrony.max_staleness=0")
    )
    return Finding(
        reason=f"answers are up to {age} old ({key}), and an estimate over sampled tokens takes them for the present student's",
        legal="weight: {engine_ratio: {high: 2.0}} | span_ratio | sampler_ratio on the term; a divergence on full | student_topk | teacher_topk; "
        f"or {off}",
        allow="stale_answers",
    )


def group_has_siblings(term: Term, setting: Setting) -> Finding | None:
    if setting.group != 1 or "group" not in term.reads:
        return None
    credited = name_of(term.credit) if term.credit else name_of(term.route)
    return Finding(
        reason=f"{credited} compares the answers of one prompt, and group is 1",
        legal="group: 2 or more; advantage: raw_reward or teacher_logratio; or a method without group credit (opd, opsd, sft)",
    )
