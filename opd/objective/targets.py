"""What the student is pulled towards on a support: the teacher, or something between the two. Constant; [N, K] log-probs."""

from torch import Tensor

from opd.choices import Share


def teacher(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """The teacher as it is."""
    return teacher_logp


def geometric(student_logp: Tensor, teacher_logp: Tensor, *, share: Share) -> Tensor:
    """softmax((1 - share) log student + share log teacher): a nearer target (trust region of SDPO, arXiv 2601.20802; TAID, 2501.16937)."""
    return ((1.0 - share) * student_logp + share * teacher_logp).log_softmax(-1)


TARGETS = {"teacher": teacher, "geometric": geometric}
