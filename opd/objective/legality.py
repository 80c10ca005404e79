"""Which combinations are refused when a recipe loads, and what to write instead.

A rule looks at one term and returns a Finding or None. A finding with an `allow` name is a published form with a known bias: a term that
lists the name runs, and the name is printed beside its results. The others have no override, because nothing useful could come of them.
"""

from collections.abc import Sequence
from dataclasses import replace

from opd.config.choices import name_of, nearest, parameters_of, what_it_reads
from opd.objective.divergences import DENSE, DIVERGENCES
from opd.objective.findings import Finding, Rule, Setting
from opd.objective.policy_rules import (
    drawn_with_a_teacher,
    group_has_siblings,
    off_policy_has_a_ratio,
    penalty_in_the_reward,
    regression_has_a_target,
    sampled_by_the_policy,
    stale_answers_are_corrected,
)
from opd.objective.terms import Term

REVERSE = ("reverse_kl", "stop_gradient_reverse_kl", "skew_reverse_kl")
BIASED = (
    "truncated_forward_kl",
    "truncated_reverse_kl",
    "truncated_jsd",
    "truncated_skew_forward_kl",
    "truncated_skew_reverse_kl",
    "truncated_divergence",
    "renormalised_reverse_kl",
    "k1_loss",
    "k3_loss",
    "k2_reward",
    "k3_reward",
    "stale_answers",
)


def check_term(term: Term, setting: Setting, where: str, allow: Sequence[str] | str) -> Term:
    """The term, with the allowed forms that it makes use of. Raises ValueError for the first illegal pair."""
    allowed = (allow,) if isinstance(allow, str) else tuple(allow)
    for name in allowed:
        if name not in BIASED:
            raise ValueError(f"{where}.allow: unknown name {name!r}{nearest(str(name), BIASED)}; valid: {', '.join(BIASED)}")
    used = []
    for rule in RULES:
        finding = rule(term, setting)
        if finding is None:
            continue
        if finding.allow not in allowed:
            override = f"; to run the published form as it is, add allow: [{finding.allow}]" if finding.allow else ""
            raise ValueError(f"{where} ({term.name}): {finding.reason}. Legal: {finding.legal}{override}")
        used.append(finding.allow)
    return replace(term, allow=tuple(used))


def check_objective(terms: Sequence[Term]) -> None:
    """Refuses terms that ask one signal, or one `prepare` pass, for two different sets of ids."""
    by_signal: dict[str, Term] = {}
    by_student: Term | None = None
    for term in terms:
        if not term.support or not term.support.sparse or not term.signal:
            continue
        first = by_signal.setdefault(term.signal, term)
        assert first.support
        kinds = {first.support.kind, term.support.kind}
        if first.support.k != term.support.k or (len(kinds) > 1 and kinds != {"teacher_topk", "unpaired"}):
            raise ValueError(
                f"objective: terms {first.name} and {term.name} read signal {term.signal!r} on different supports "
                f"({first.support.kind} k={first.support.k}, {term.support.kind} k={term.support.k}), "
                "and a signal is scored at one set of ids. "
                "Legal: the same support and k, or a second entry of signals: with the same weights and view"
            )
        if term.support.by_student:
            by_student = by_student or term
            assert by_student.support
            if by_student.support.k != term.support.k:
                raise ValueError(
                    f"objective: terms {by_student.name} and {term.name} want the student's top {by_student.support.k} and "
                    f"{term.support.k}, which are chosen once a batch. Legal: one k for both"
                )


def signal_declared(term: Term, setting: Setting) -> Finding | None:
    missing = sorted(term.signals - set(setting.signals)) if setting.signals is not None else []
    if not missing:
        return None
    declared = ", ".join(sorted(setting.signals or ())) or "none"
    return Finding(
        reason=f"the recipe does not declare the signal {missing[0]!r}{nearest(missing[0], setting.signals or ())}; declared: {declared}",
        legal=(
            "teacher: and view: (they make the signal main), an entry of signals:, or signal: with a declared name; "
            "a method that needs no teacher is grpo"
        ),
    )


def context_is_declared(term: Term, setting: Setting) -> Finding | None:
    if not term.context or setting.signals is None or term.context in setting.signals:
        return None
    return Finding(
        reason=f"learns under the view of {term.context!r}{nearest(term.context, setting.signals)}, which the recipe does not declare",
        legal="context: with a declared signal, or no context for the student's own prompt",
    )


def context_has_its_own_ids(term: Term, setting: Setting) -> Finding | None:
    if not term.context or not term.support or not term.support.by_student:
        return None
    return Finding(
        reason="the student's top-k ids are chosen in its own context, and this term learns in another",
        legal="support: full | teacher_topk | sampled",
    )


def route_sees_a_view(term: Term, setting: Setting) -> Finding | None:
    if not term.asks_view or setting.signals is None or term.view_signal in setting.signals:
        return None
    return Finding(
        reason=f"routes by the views of the signal {term.view_signal!r}, which the recipe does not declare",
        legal="declare it with view: and teacher:, name another one with signal:, or route: all | correct | wrong",
    )


def dense_form_exists(term: Term, setting: Setting) -> Finding | None:
    if term.support is None or term.support.kind != "full" or term.dense is not None:
        return None
    return Finding(
        reason="support full runs inside the vocabulary kernels, which know the named divergences only",
        legal=f"distill: {' | '.join(DENSE)}, or support: {{student_topk: {{k: 64, tail: bucket}}}} for a function of your own",
    )


def clip_is_dense(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.kind == "full" or parameters_of(term.loss or name_of).get("entry_clip") is None:
        return None
    return Finding(
        reason="entry_clip bounds single vocabulary entries, but a top-k or sampled support has lumped or lost most of them",
        legal="support: full, or the divergence without entry_clip",
    )


def token_clip_is_sparse(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.kind != "full" or parameters_of(term.loss or name_of).get("token_clip") is None:
        return None
    return Finding(
        reason="token_clip bounds a token's divergence, and the vocabulary kernels have its gradient before its value is known",
        legal="support: {student_topk: {k: 100, tail: bucket}} (or teacher_topk), or entry_clip",
    )


def k_fits(term: Term, setting: Setting) -> Finding | None:
    asked = [parameters_of(function)["k"] for function in term.functions if "teacher_topk" in what_it_reads(function)]
    k = max([term.support.k if term.support else 0, *asked])
    if setting.vocabulary is None or k <= setting.vocabulary:
        return None
    return Finding(
        reason=f"k is {k} and the vocabulary has {setting.vocabulary} tokens",
        legal=f"k of at most {setting.vocabulary}, or support: full",
    )


def renormalised_needs_two(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.tail != "renormalise" or term.support.k != 1:
        return None
    return Finding(
        reason="one token renormalised has probability 1 on both sides, so loss and gradient are always zero",
        legal="k of at least 2, tail: bucket, or support: sampled",
    )


def drawn_support(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.kind != "teacher_sample" or (term.loss and name_of(term.loss) == "forward_kl"):
        return None
    return Finding(
        reason=f"{name_of(term.loss) if term.loss else ''} is not linear in the teacher, so an estimate of the teacher from draws biases it",
        legal="distill: forward_kl with support: teacher_sample, or support: full | student_topk | teacher_topk",
    )


def unpaired_by_rank(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.kind != "unpaired" or (term.loss and name_of(term.loss) == "rank_distance" and term.target is None):
        return None
    return Finding(
        reason="the support unpaired holds different tokens of two vocabularies side by side, by rank; only sizes of probabilities can be compared",
        legal="distill: rank_distance with support: unpaired and no target, or support: teacher_topk",
    )


def dropped_tail(term: Term, setting: Setting) -> Finding | None:
    if not term.support or not term.support.sparse or term.support.tail != "drop" or term.support.kind in ("teacher_sample", "unpaired"):
        return None
    name = name_of(term.loss) if term.loss else ""
    if name == "stop_gradient_reverse_kl" and term.support.kind == "student_topk":
        return None
    if name in ("plackett_luce", "expected_advantage"):  # an order of candidates; an advantage that is zero elsewhere
        return None
    known = {"stop_gradient_reverse_kl": "reverse_kl"}.get(name, name)
    return Finding(
        reason=(
            f"{name} over a truncated support is no divergence: it can be negative, and its gradient is not zero where student and teacher agree"
        ),
        legal="tail: bucket, tail: renormalise, support: full, or stop_gradient_reverse_kl on student_topk",
        allow=f"truncated_{known}" if f"truncated_{known}" in BIASED else "truncated_divergence",
    )


def renormalised_reverse(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.tail != "renormalise" or term.support.kind != "teacher_topk":
        return None
    if not term.loss or name_of(term.loss) not in REVERSE:
        return None
    return Finding(
        reason="reverse KL renormalised on the teacher's top-k does not see what the student puts outside it, and lets it stay there",
        legal="support: student_topk, tail: bucket, support: full, or forward_kl",
        allow="renormalised_reverse_kl",
    )


def sampled_estimator(term: Term, setting: Setting) -> Finding | None:
    if not term.support or term.support.kind != "sampled":
        return None
    name = name_of(term.loss) if term.loss else ""
    if name in ("sampled_reverse_kl", "k2", "k3_with_ratio"):
        return None
    if name == "k1":
        return Finding(reason="k1 as a loss has expected gradient zero: it does nothing but add noise", legal="reference_kl: k2", allow="k1_loss")
    if name == "k3":
        reason = "k3 as a loss has the reverse KL's value but the forward KL's gradient"
        return Finding(reason=reason, legal="reference_kl: k2 or k3_with_ratio", allow="k3_loss")
    return Finding(
        reason=f"{name} cannot be estimated from the sampled token alone",
        legal="distill: reverse_kl with support: sampled, or support: full | student_topk | teacher_topk",
    )


def target_on_categories(term: Term, setting: Setting) -> Finding | None:
    if term.target is None or name_of(term.target) == "log_ratio" or (term.support and term.support.sparse and term.support.tail != "drop"):
        return None
    return Finding(
        reason=f"the target {name_of(term.target)} mixes two distributions, so it needs categories that sum to one",
        legal="support: student_topk | teacher_topk with tail: bucket or renormalise, or target: teacher",
    )


def linear_needs_an_advantage(term: Term, setting: Setting) -> Finding | None:
    linear = term.loss is not None and name_of(term.loss) == "expected_advantage"
    ratio = term.target is not None and name_of(term.target) == "log_ratio"
    if linear == ratio:
        return None
    return Finding(
        reason="expected_advantage is linear in the student's probabilities and takes a log-ratio of two signals, which is no distribution",
        legal="distill: expected_advantage with target: {log_ratio: {reference: ...}}, or another divergence with another target",
    )


def one_set_of_ids(term: Term, setting: Setting) -> Finding | None:
    """What compares two scorings token by token needs them at the same ids: the student's top-k, or the union of everybody's."""
    shared = "shared_ids" in term.reads or len(term.supported_signals) > 1
    own = "student_ids" in term.reads
    if not shared or (term.support is not None and (term.support.kind == "student_topk" or (term.support.kind == "union" and not own))):
        return None
    union = "" if own else " | {union: {k: 64, tail: bucket}}"
    return Finding(
        reason="compares several scorings at the same vocabulary entries, which only the student's top-k offers to all signals"
        if own
        else "compares several scorings at the same vocabulary entries, which only the student's top-k and the union offer to all signals",
        legal="support: {student_topk: {k: 64, tail: bucket}}" + union,
    )


def ranking_needs_candidates(term: Term, setting: Setting) -> Finding | None:
    if term.loss is None or name_of(term.loss) != "plackett_luce" or (term.support and term.support.sparse and term.support.tail == "drop"):
        return None
    return Finding(reason="plackett_luce orders candidate tokens, and the rest of the vocabulary is none", legal="a top-k support with tail: drop")


def spans_have_their_own_loss(term: Term, setting: Setting) -> Finding | None:
    name = name_of(term.loss) if term.loss else ""
    on_spans = bool(term.support) and term.support.kind == "spans"
    if on_spans == (name == "span_likelihood") or (on_spans and name not in DIVERGENCES):
        return None
    return Finding(
        reason="a run of tokens has one log-prob and no distribution, so spans and span_likelihood go together and with nothing else",
        legal="distill: span_likelihood with support: spans (the method alm), or another divergence on full | student_topk | teacher_topk",
    )


def weight_reads_signal(term: Term, setting: Setting) -> Finding | None:
    if "signal" not in term.reads or term.signal is not None:
        return None
    return Finding(
        reason="a weight reads the teacher's entropy, but the term has no signal",
        legal="the weight on a distill term, or student_confidence",
    )


RULES: tuple[Rule, ...] = (
    signal_declared,
    context_is_declared,
    context_has_its_own_ids,
    off_policy_has_a_ratio,
    route_sees_a_view,
    dense_form_exists,
    clip_is_dense,
    token_clip_is_sparse,
    k_fits,
    renormalised_needs_two,
    drawn_support,
    unpaired_by_rank,
    dropped_tail,
    renormalised_reverse,
    sampled_estimator,
    target_on_categories,
    linear_needs_an_advantage,
    one_set_of_ids,
    ranking_needs_candidates,
    spans_have_their_own_loss,
    penalty_in_the_reward,
    weight_reads_signal,
    regression_has_a_target,
    sampled_by_the_policy,
    drawn_with_a_teacher,
    stale_answers_are_corrected,
    group_has_siblings,
)
