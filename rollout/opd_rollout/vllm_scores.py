"""From vLLM's prompt log-probs to scores: pure array functions.

Legend: T completion tokens, K support size, V vocabulary, C columns that vLLM returned.
"""

import numpy as np

from opd_rollout.vllm_types import Scored, ScoreJob

PAD_LOGP = -1e4


def from_rows(job: ScoreJob, ids_TC: np.ndarray, logp_TC: np.ndarray) -> Scored:
    """Scores out of rows that hold each token's own id and the C - 1 most likely ones (temperature 1).

    Raises ValueError where an id that was asked for is not among them: a missing score is not a score of zero.
    """
    token_T = np.asarray(job.completion_ids)
    sampled = _look_up(ids_TC, logp_TC, token_T[:, None], "its own token")[:, 0]
    if job.support_ids is not None:
        wanted = job.support_ids
        logp = _look_up(ids_TC, logp_TC, wanted, "an id of the student's support")
        return _scored(sampled, wanted, logp, logp)
    ids = token_T[:, None]
    if job.k:
        top = ids_TC[:, 1 : job.k + 1]
        assert top.shape[1] == job.k, f"{top.shape[1]} ids came back where {job.k} were asked for"
        ids = np.concatenate([ids, np.where(top == ids, -1, top)], axis=1)
    logp = _look_up(ids_TC, logp_TC, ids, "an id of the teacher's support")
    return _scored(sampled, ids, logp, logp)


def from_vocabulary(job: ScoreJob, logp_TV: np.ndarray, temperature: float) -> Scored:
    """Scores out of whole rows: exact at every id, temperature and entropy."""
    logp_TV = logp_TV.astype(np.float64) / temperature
    logp_TV -= logp_TV.max(axis=1, keepdims=True)
    logp_TV -= np.log(np.exp(logp_TV).sum(axis=1, keepdims=True))
    token_T1 = np.asarray(job.completion_ids)[:, None]
    sampled = np.take_along_axis(logp_TV, token_T1, axis=1)[:, 0]
    ids = token_T1
    if job.support_ids is not None:
        ids = job.support_ids
    elif job.k:
        top = np.argsort(-logp_TV, axis=1, kind="stable")[:, : job.k]
        ids = np.concatenate([ids, np.where(top == ids, -1, top)], axis=1)
    logp = np.where(ids >= 0, np.take_along_axis(logp_TV, np.maximum(ids, 0), axis=1), PAD_LOGP)
    entropy = -(np.exp(logp_TV) * logp_TV).sum(axis=1)
    return _scored(sampled, ids, logp, logp, entropy=entropy)


def from_fixed_ids(job: ScoreJob, logp_TC: np.ndarray) -> Scored:
    """Scores out of the log-probs of [token, support] at temperature 1."""
    if logp_TC.shape != (len(job.completion_ids), 1 + (0 if job.support_ids is None else job.support_ids.shape[1])):
        raise ValueError(f"the teacher's engine returned scores of shape {list(logp_TC.shape)}; a score is missing")
    sampled = logp_TC[:, 0]
    if job.support_ids is None:
        return _scored(sampled, np.asarray(job.completion_ids)[:, None], logp_TC, logp_TC)
    logp = np.where(job.support_ids >= 0, logp_TC[:, 1:], PAD_LOGP)
    return _scored(sampled, job.support_ids, logp, logp)


def _look_up(ids_TC: np.ndarray, logp_TC: np.ndarray, wanted_TK: np.ndarray, what: str) -> np.ndarray:
    if len(ids_TC) != len(wanted_TK):
        raise ValueError(f"the teacher's engine scored {len(ids_TC)} of {len(wanted_TK)} tokens; a score is missing")
    order = np.argsort(ids_TC, axis=1, kind="stable")
    found = np.full(wanted_TK.shape, PAD_LOGP, dtype=np.float64)
    for row in range(len(wanted_TK)):  # rows are few hundred, columns few: numpy has no row-wise searchsorted
        place = np.searchsorted(ids_TC[row], wanted_TK[row], sorter=order[row]).clip(max=ids_TC.shape[1] - 1)
        column = order[row][place]
        present = ids_TC[row][column] == wanted_TK[row]
        if not (present | (wanted_TK[row] < 0)).all():
            missing = int(wanted_TK[row][~present & (wanted_TK[row] >= 0)][0])
            raise ValueError(
                f"the teacher's engine gave no score for {what} ({missing}, token {row} of {len(wanted_TK)}): it lies outside of its "
                f"{ids_TC.shape[1] - 1} most likely ids. This engine cannot score given ids (vLLM's model runner V2 can, on a GPU): use a "
                "teacher_topk support, or a teacher in process (engine: torch)"
            )
        found[row] = np.where(wanted_TK[row] >= 0, logp_TC[row][column], PAD_LOGP)
    return found


def _scored(sampled: np.ndarray, ids: np.ndarray, logp: np.ndarray, inside: np.ndarray, entropy: np.ndarray | None = None) -> Scored:
    if not (np.isfinite(sampled).all() and np.isfinite(logp).all()):
        raise ValueError("the teacher's engine returned a log-prob that is not finite; a score is missing")
    mass = np.where(ids >= 0, np.exp(inside.astype(np.float64)), 0.0).sum(axis=1)
    tail = np.log(np.maximum(1.0 - mass, np.exp(-50.0)))
    return Scored(
        sampled=sampled.astype(np.float32),
        ids=ids.astype(np.int32),
        logp=logp.astype(np.float32),
        tail_logp=tail.astype(np.float32),
        entropy=np.full(len(sampled), np.nan, dtype=np.float32) if entropy is None else entropy.astype(np.float32),
    )
