"""From what vLLM returns to scores, by hand: whole rows, likeliest rows and given ids say the same, and nothing missing becomes a number."""

import numpy as np
import pytest
from opd_rollout.vllm_scores import PAD_LOGP, from_fixed_ids, from_rows, from_vocabulary
from opd_rollout.vllm_types import ScoreJob

P_TV = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
LOGP_TV = np.log(P_TV)
TOKENS = (2, 3)
SUPPORT = np.array([[0, 1], [3, -1]], dtype=np.int32)


def job(**asked):
    return ScoreJob(**{"context_ids": (1,), "completion_ids": TOKENS, "support_ids": None, "k": 0, **asked})


def rows(columns):
    """As vLLM gives them: a token's own id, then the likeliest ones."""
    ids = np.concatenate([np.array(TOKENS)[:, None], np.argsort(-LOGP_TV, axis=1, kind="stable")[:, :columns]], axis=1)
    return ids, np.take_along_axis(LOGP_TV, ids, axis=1)


def test_given_ids_have_their_log_probs_and_what_is_left_is_the_tail():
    given = np.log([[0.125, 0.5, 0.25], [0.4, 0.4, 1.0]])
    asked = job(support_ids=SUPPORT)
    for found in (from_fixed_ids(asked, given), from_rows(asked, *rows(4)), from_vocabulary(asked, LOGP_TV, 1.0)):
        assert np.allclose(np.exp(found.sampled), [0.125, 0.4])
        assert found.ids.tolist() == SUPPORT.tolist() and found.logp[1, 1] == np.float32(PAD_LOGP)
        assert np.allclose(np.exp(found.logp), [[0.5, 0.25], [0.4, 0.0]])
        assert np.allclose(np.exp(found.tail_logp), [0.25, 0.6])


def test_the_likeliest_ids_follow_the_token_which_is_not_counted_twice():
    for found in (from_rows(job(k=2), *rows(2)), from_vocabulary(job(k=2), LOGP_TV, 1.0)):
        assert found.ids.tolist() == [[2, 0, 1], [3, -1, 2]]
        assert np.allclose(np.exp(found.tail_logp), [0.125, 0.3])


def test_a_temperature_and_the_entropy_need_whole_rows():
    found = from_vocabulary(job(), LOGP_TV, 0.5)
    squares = P_TV**2 / (P_TV**2).sum(axis=1, keepdims=True)
    assert np.allclose(np.exp(found.sampled), [squares[0, 2], squares[1, 3]])
    assert np.allclose(found.entropy, -(squares * np.log(squares)).sum(axis=1))
    assert np.isnan(from_rows(job(k=2), *rows(2)).entropy).all()


def test_a_missing_score_is_an_error():
    with pytest.raises(ValueError, match=r"no score for an id of the student's support \(1, token 0 of 2\): it lies outside of its 1 "):
        from_rows(job(support_ids=SUPPORT), *rows(1))
    ids, logp = rows(4)
    with pytest.raises(ValueError, match="scored 1 of 2 tokens; a score is missing"):
        from_rows(job(k=2), ids[:1], logp[:1])
    with pytest.raises(ValueError, match=r"scores of shape \[2, 2\]; a score is missing"):
        from_fixed_ids(job(support_ids=SUPPORT), logp[:, :2])
    logp[1, 0] = np.nan
    with pytest.raises(ValueError, match="not finite; a score is missing"):
        from_fixed_ids(job(support_ids=SUPPORT), logp[:, :3])
