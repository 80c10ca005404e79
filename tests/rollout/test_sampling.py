import math

import pytest
import torch
from opd_rollout.sampling import check_sampling, draw, request_seed, truncate, uniforms
from opd_rollout.types import Sampling

NEG_INF = float("-inf")
PINNED = [
    ["0x1.c4415072f63b9p-1", "0x1.b9e279aa86e58p-2", "0x1.b117462002500p-6"],
    ["0x1.7fdf0061bb85ap-1", "0x1.7d54b3920bcaap-2", "0x1.c0cd7f0f6bcf6p-2"],
    ["0x1.1b37f6f86d230p-5", "0x1.8e30163e10460p-1", "0x1.29d6dcf2af42cp-2"],
]
PINNED_SEED = 2645093131483628936


def _frequencies(logits: list[float], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of a fine regular grid of noise that gives each token, and the log-probability reported with it (NaN where never drawn)."""
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    rows = torch.tensor(logits, dtype=torch.float64).expand(len(grid), -1)
    token, logp = draw(rows, grid, temperature=temperature, top_p=top_p, top_k=top_k)
    reported = torch.full((len(logits),), float("nan"), dtype=torch.float64)
    reported[token] = logp
    return torch.bincount(token, minlength=len(logits)) / len(grid), reported


def test_noise_is_pinned_bit_for_bit() -> None:
    noise = uniforms([0, 1, 2**62 + 5], 3)
    assert noise.dtype == torch.float64
    assert [[value.hex() for value in row] for row in noise.tolist()] == PINNED


def test_noise_equals_splitmix64_in_plain_integers() -> None:
    mask = 2**64 - 1

    def mix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    seed = 123456789012345678
    expected = [(mix((mix(seed) + (t + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53 for t in range(5)]
    assert uniforms([seed], 5).tolist() == [expected]


def test_noise_depends_on_seed_and_position_alone() -> None:
    together = uniforms([7, 8, 9], 6)
    assert torch.equal(uniforms([8], 4)[0], together[1, :4])


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniforms(range(2000), 50)
    assert abs(noise.mean().item() - 0.5) < 4 / math.sqrt(12 * noise.numel())
    counts = torch.histc(noise.float(), bins=20, min=0, max=1)
    expected = noise.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    shifted = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    neighbours = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert max(abs(shifted), abs(neighbours)) < 4 / math.sqrt(noise.numel())


def test_request_seeds_are_pinned_and_distinct() -> None:
    assert request_seed(0, "expr/17", 3, 5) == PINNED_SEED
    seeds = {request_seed(run, name, sample, step) for run in (0, 1) for name in ("1", "11") for sample in range(12) for step in range(12)}
    assert len(seeds) == 2 * 2 * 12 * 12
    assert 0 <= min(seeds) <= max(seeds) < 2**63


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_enumerated_noise_reproduces_the_distribution(temperature: float) -> None:
    logits = [0.3, -1.0, 2.0, NEG_INF, 0.9]
    share, logp = _frequencies(logits, temperature=temperature)
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, dim=0)
    assert (share - expected).abs().max() < 2e-5  # a grid point at each of the four borders
    assert share[3] == 0
    drawn = share > 0
    torch.testing.assert_close(logp[drawn], expected[drawn].log(), rtol=0, atol=1e-12)


def test_top_k_by_hand() -> None:
    share, logp = _frequencies([math.log(value) for value in (0.1, 0.4, 0.2, 0.3)], top_k=2)
    torch.testing.assert_close(share.double(), torch.tensor([0, 4 / 7, 0, 3 / 7], dtype=torch.float64), rtol=0, atol=2e-5)
    assert logp[1].item() == pytest.approx(math.log(4 / 7))
    assert logp[3].item() == pytest.approx(math.log(3 / 7))


def test_top_p_by_hand() -> None:
    logits = [math.log(value) for value in (0.1, 0.4, 0.2, 0.3)]
    share, _ = _frequencies(logits, top_p=0.69)
    torch.testing.assert_close(share.double(), torch.tensor([0, 4 / 7, 0, 3 / 7], dtype=torch.float64), rtol=0, atol=2e-5)
    share, _ = _frequencies(logits, top_p=0.71)
    torch.testing.assert_close(share.double(), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9], dtype=torch.float64), rtol=0, atol=2e-5)
    share, logp = _frequencies(logits, top_p=0.01)
    assert share.tolist() == [0, 1, 0, 0]
    assert logp[1] == 0


def test_top_p_is_taken_of_the_top_k() -> None:
    kept = truncate(torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])), top_p=0.55, top_k=2)
    torch.testing.assert_close(kept.exp(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # 0.4 / 0.7 = 0.571 suffices


def test_ties_at_the_border_of_top_k_go_to_the_lowest_id() -> None:
    kept = truncate(torch.log(torch.full((1, 6), 1 / 6)), top_p=1.0, top_k=3)
    assert (kept[0] > NEG_INF).tolist() == [True, True, True, False, False, False]


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logp = torch.log_softmax(torch.tensor([[0.5, -0.5, 0.0]]), dim=-1)
    torch.testing.assert_close(truncate(logp, top_p=1.0, top_k=10), logp)


def test_temperature_zero_is_the_largest_logit_with_certainty() -> None:
    token, logp = draw(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), torch.tensor([0.9, 0.9]), temperature=0)
    assert token.tolist() == [1, 0]
    assert logp.tolist() == [0.0, 0.0]


def test_extreme_noise_stays_inside_the_support() -> None:
    logits = torch.tensor([[NEG_INF, 0.0, -30.0, NEG_INF]] * 2)
    token, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), temperature=1.0)
    assert token.tolist() == [1, 2]  # exp(-30) is larger than 2^-53


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(Sampling(**values))


@pytest.mark.parametrize("vocabulary", [4097, 5000, 32_000])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 50, "top_p": 0.9}])
def test_a_large_vocabulary_is_drawn_as_one_cumulative_sum_would(vocabulary: int, options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=generator) * 4
    logits[:, : vocabulary // 3] = float("-inf")
    logits[:, -200:] = float("-inf")
    noise = torch.tensor([0.0, 1e-12, 0.3, 0.5, 0.999, 1 - 2**-53], dtype=torch.float64)
    token, logp = draw(logits, noise, **{"temperature": 1.0, **options})
    expected = torch.log_softmax(logits.double() / options.get("temperature", 1.0), dim=-1)
    if "top_k" in options:
        expected = truncate(expected, top_k=50, top_p=0.9)
    cumulative = expected.exp().cumsum(dim=-1)
    for row in range(6):
        above = (cumulative[row] > noise[row] * cumulative[row, -1]).nonzero()[0].item()
        assert token[row] == above
        assert logp[row].item() == pytest.approx(expected[row, above].item(), abs=2e-5)


def test_the_first_block_of_a_large_vocabulary_by_hand() -> None:
    logits = torch.full((3, 5000), NEG_INF)
    logits[:, [2, 5, 4999]] = torch.tensor([0.2, 0.3, 0.5]).log()
    token, logp = draw(logits, torch.tensor([0.19, 0.21, 0.51], dtype=torch.float64), temperature=1.0)
    assert token.tolist() == [2, 5, 4999]
    assert logp.exp().tolist() == pytest.approx([0.2, 0.3, 0.5], abs=1e-6)


def test_noise_next_to_one_stays_inside_the_support_of_a_large_vocabulary() -> None:
    """A block's sum and the last of its partial sums differ in their last bits, and ids behind the support would lie between them."""
    logits = torch.full((200, 5000), NEG_INF)
    logits[:, :120] = torch.randn(200, 120, generator=torch.Generator().manual_seed(0)) * 8
    token, logp = draw(logits, torch.full((200,), 1 - 2.0**-53, dtype=torch.float64), temperature=1.0)
    assert token.max() < 120 and logp.isfinite().all()


def test_a_large_vocabulary_with_nan_shows_it() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, 7] = float("nan")
    token, logp = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), temperature=1.0)
    assert token[0] < 5000, "an id that the next step can read, so that the engine comes to say what is wrong"
    assert logp[0].isnan() and logp[1].item() == pytest.approx(-math.log(5000), abs=1e-6)
