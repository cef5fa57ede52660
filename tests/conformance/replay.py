"""Samplers driven step by step on recorded noise, through the context that the driver builds."""

from dataclasses import replace

import torch

from invdiff.plan import Plan, bind
from invdiff.rng import Streams


class Replay(Streams):
    """Streams that give recorded numbers, one tensor ``(B, ...)`` for each call of ``normal``."""

    def __init__(self, noise, cases=None):
        rows = noise.shape[1]
        draws = rows // (cases or rows)
        super().__init__(0, [divmod(row, draws) for row in range(rows)])
        self.left = list(noise)

    def normal(self, like):
        z = self.left.pop(0)
        assert z.shape == like.shape, f"recorded {tuple(z.shape)}, asked for {tuple(like.shape)}"
        return z.to(like)


def record(n, rows, shape, seed=7):
    """Return ``n`` tensors of standard normal numbers, ``(n, rows, *shape)``."""
    return torch.randn(n, rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(sampler, problem, prior, levels, rows):
    """Return the driver's context of all cases (one draw each), on a noise grid of one's own."""
    shape = None if problem else prior.denoiser.space
    target = bind(problem, prior, shape, torch.device("cpu"))
    plan = Plan(target, sampler, rows // target.cases, 0, torch.float64, "mark")
    return replace(plan.context(0, rows)[0], sigmas=torch.as_tensor(levels, dtype=torch.float64))


def chain(sampler, problem, prior, levels, noise, start=None):
    """Return the states in prior coordinates at all levels, the last one finished.

    Args:
        sampler: A sampler, or a function of the two levels of a step that returns one.
        levels: ``(K + 1,)``.
        noise: ``(n, rows, ...)``, in the order in which it is used.
        start: State at the first level; by default what the sampler's ``init`` makes of the noise.
    """
    pick = sampler if callable(sampler) else lambda s, t: sampler
    first, rng = pick(float(levels[0]), float(levels[1])), Replay(noise, problem.n_cases if problem else 1)
    ctx = context(first, problem, prior, levels, noise.shape[1])
    state = first.init(ctx, noise.shape[1], rng.at(-1)) if start is None else {"x": start}
    states = [state["x"]]
    for k in range(len(levels) - 1):
        state = pick(*ctx.level(k)).step(k, state, ctx, rng.at(k))
        states.append(state["x"])
    return [*states[:-1], pick(*ctx.level(k)).finish(state, ctx)]
