import numpy as np
import torch

from invdiff.primitives import conditioned, ess, log_normal, mala, normalise, particles, resample, select, shared
from invdiff.rng import Streams


def streams(cases=2, draws=1000, seed=0):
    return Streams(seed, [(c, d) for c in range(cases) for d in range(draws)]).at(0)


def test_weights_are_normalised_case_by_case():
    rng = streams(2, 3)
    w = normalise(torch.tensor([0.0, 0.0, 0.0, -1e5, 0.0, float("nan")]), rng)
    assert torch.allclose(w, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 1, 0]))
    assert torch.allclose(ess(w.log(), rng), torch.tensor([3.0, 3, 3, 1, 1, 1]))


def test_resampling_keeps_cases_apart_and_has_the_right_law():
    rng = streams(2, 1000)
    l = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    index, new = resample(l, rng)
    assert (index[:1000] < 1000).all() and (index[1000:] >= 1000).all()
    w = normalise(l, rng)
    counts = torch.bincount(index, minlength=2000)
    assert (counts - 1000 * w).abs().max() <= 1 + 1e-9  # systematic: never further than one
    assert torch.allclose(new[:1000].logsumexp(0), l[:1000].logsumexp(0))
    kept, same = resample(l, rng, threshold=0.0)
    assert (kept == torch.arange(2000)).all() and (same == l).all()


def test_a_particle_without_a_weight_is_replaced_and_spoils_no_other():
    rng = streams(1, 4)
    index, new = resample(torch.tensor([0.0, float("nan"), 0.0, -torch.inf], dtype=torch.float64), rng)
    assert set(index.tolist()) == {0, 2} and torch.isfinite(new).all()


def test_accounts_of_the_particles():
    rng = streams(2, 4)
    accounts = particles(8, rng, torch.device("cpu"))
    weight = torch.tensor([0.0, 0, -torch.inf, -torch.inf, 0, 0, 0, 0], dtype=torch.float64)
    _, accounts = select(accounts, weight, rng, threshold=0.6)
    assert accounts["ess"].tolist() == [2, 2, 2, 2, 4, 4, 4, 4]
    _, accounts = select(accounts, weight, rng, threshold=0.6)
    assert torch.allclose(
        accounts["ess_run"][:4], torch.full((4,), 4 / 3, dtype=torch.float64)
    )  # 1/4 + 2 (1/2 - 1/4)
    assert torch.allclose(accounts["ess_run"][4:], torch.full((4,), 4.0, dtype=torch.float64))
    _, kept = select(accounts, weight, rng, threshold=0.1)
    assert torch.equal(kept["ess_run"], accounts["ess_run"]) and torch.equal(kept["log_weight"], weight)


def test_what_a_case_shares_is_its_first_row():
    x = torch.arange(6.0).reshape(6, 1)
    assert shared(x, streams(2, 3)).flatten().tolist() == [0, 0, 0, 3, 3, 3]


def test_conditioning_on_noisy_sight_of_a_component():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    mean, target = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])
    v = torch.tensor([1.0, torch.inf, 0.0], dtype=torch.float64)
    x = mean + 2.0 * z + conditioned(mean.expand(20000, 3), z, 2.0, target, v)
    expected = torch.tensor([1 + 0.8 * 2, 1.0, 3.0], dtype=torch.float64)
    assert torch.allclose(x.mean(0), expected, atol=0.05)
    assert torch.allclose(x.std(0), torch.tensor([0.8**0.5, 2.0, 0.0], dtype=torch.float64), atol=0.03)
    still = conditioned(mean[None], z[:1], 0.0, target, torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(still, (target - mean)[None].double())


def test_normal_density_up_to_the_constant():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = log_normal(x, torch.ones(3), 2.0)
    theirs = torch.distributions.Normal(1.0, 2.0**0.5).log_prob(x).sum(1)
    assert torch.allclose(ours - theirs, (ours - theirs)[:1].expand(4))


def test_mala_from_the_score_alone_leaves_a_density_invariant():
    """A skewed target: an unadjusted chain of this step size is visibly wrong."""
    shape, n = 5.0, 4000

    def score(x):  # log of a Gamma(5) variable
        return shape - x.exp()

    rng = streams(1, n)
    x = torch.from_numpy(np.log(np.random.default_rng(0).gamma(shape, size=(n, 1))))
    y, share = mala(x, score, 0.15, 30, rng, nodes=4)
    expected = torch.digamma(torch.tensor(shape, dtype=torch.float64))
    width = torch.polygamma(1, torch.tensor(shape, dtype=torch.float64)).sqrt()
    assert 0.5 < share.mean() < 0.99
    assert abs(y.mean() - expected) < 4 * width / n**0.5 * 1.5
    assert abs(y.std() / width - 1) < 0.05
