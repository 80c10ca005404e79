"""The divergences by name, each a frozen record; p is the student, q the teacher."""

from numbers import Real

from opd_kernels.types import Divergence, ElementFn

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "elementwise")


def forward_kl(*, entry_clip: float | None = None) -> Divergence:
    """KL(q || p); with `entry_clip` the per-entry clip of OPSD (arXiv 2601.18734)."""
    return checked(Divergence(name="forward_kl", entry_clip=entry_clip))


def reverse_kl(*, entry_clip: float | None = None) -> Divergence:
    """KL(p || q)."""
    return checked(Divergence(name="reverse_kl", entry_clip=entry_clip))


def jsd(mix: float = 0.5, *, entry_clip: float | None = None) -> Divergence:
    """mix * KL(q || M) + (1 - mix) * KL(p || M) with M = mix * q + (1 - mix) * p (generalised JSD, arXiv 2306.13649)."""
    return checked(Divergence(name="jsd", mix=mix, entry_clip=entry_clip))


def skew_forward_kl(alpha: float, *, entry_clip: float | None = None) -> Divergence:
    """KL(q || alpha * q + (1 - alpha) * p) (arXiv 2402.03898)."""
    return checked(Divergence(name="skew_forward_kl", alpha=alpha, entry_clip=entry_clip))


def skew_reverse_kl(alpha: float, *, entry_clip: float | None = None) -> Divergence:
    """KL(p || alpha * p + (1 - alpha) * q) (arXiv 2402.03898)."""
    return checked(Divergence(name="skew_reverse_kl", alpha=alpha, entry_clip=entry_clip))


def elementwise(value: ElementFn, slope: ElementFn, *, entry_clip: float | None = None) -> Divergence:
    """Any sum over the vocabulary of value(lp, lq), with slope = d value / d lp; backends reference and torch only."""
    return checked(Divergence(name="elementwise", value=value, slope=slope, entry_clip=entry_clip))


def checked(divergence: Divergence) -> Divergence:
    """The record itself; raises ValueError where its name or one of its numbers does not fit."""
    if divergence.name not in NAMES:
        raise ValueError(f"divergence has the name {divergence.name!r}; it must be one of {', '.join(NAMES)}")
    for name in ("value", "slope") if divergence.name == "elementwise" else ():
        if not callable(getattr(divergence, name)):
            raise ValueError(f"{name} is {getattr(divergence, name)!r}; it must be a function (lp, lq) -> tensor")
    if not isinstance(divergence.mix, Real) or not 0.0 < divergence.mix < 1.0:
        raise ValueError(f"mix is {divergence.mix!r}; it must lie strictly between 0 and 1 (use forward_kl or reverse_kl at the ends)")
    if not isinstance(divergence.alpha, Real) or not 0.0 <= divergence.alpha < 1.0:
        raise ValueError(f"alpha is {divergence.alpha!r}; it must be at least 0 and below 1 (at 1 the divergence is 0)")
    clip = divergence.entry_clip
    if clip is not None and not (isinstance(clip, Real) and not isinstance(clip, bool) and clip >= 0.0):
        raise ValueError(f"entry_clip is {clip!r}; it must be at least 0, or None for no clip")
    return divergence
