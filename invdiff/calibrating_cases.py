"""Simulated cases in blocks: true images, data, and the draws of a sampler, kept in a folder where there is one.

Every block has seeds of its own, so that what is done does not depend on how many cases there will be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invdiff.callbacks import Callback, RunInfo, StepInfo
from invdiff.driver import sample
from invdiff.errors import InvdiffError
from invdiff.likelihood import array_sha256
from invdiff.plan import Target
from invdiff.posterior import Posterior, open_posterior
from invdiff.priors.exact import ExactDenoiser
from invdiff.problem import Problem
from invdiff.sampler import Sampler

if TYPE_CHECKING:
    from invdiff.prior import Prior

#: Images for the cases: an array ``(n, *image)``, or a function of the number of the case.
Images = torch.Tensor | np.ndarray | Callable[[int], Any]


@dataclass(frozen=True)
class Blocks:
    """How blocks of cases are made."""

    target: Target
    prior: Prior
    sampler: Sampler
    draws: int
    seed: int
    folder: Path | None
    batch: int | None

    def block(
        self, first: int, count: int, truths: Truths, budget_s: float | None, total: Total
    ) -> tuple[Problem, Posterior]:
        """Return the simulated problem of ``count`` cases and their draws, from the folder where it has them."""
        name = f"cases-{first:06d}-{first + count:06d}"
        problem = self.target.problem
        assert problem is not None
        options: dict[str, Any] = {"device": self.target.device, "progress": False, "max_batch": self.batch}
        x = self._truth(name, first, count, truths, options)
        noise = derived(self.seed, 1, first)
        operator, likelihood = problem.operator.to("cpu"), problem.likelihood.to("cpu")
        simulated = Problem.simulate(operator, likelihood, x, noise, dict(problem.meta))

        def draw(**where: Any) -> Posterior:
            return sample(
                simulated,
                self.prior,
                self.sampler,
                draws=self.draws,
                seed=derived(self.seed, 2, first),
                callbacks=[total],
                time_budget_s=budget_s,
                **options,
                **where,
            )

        before = total.rows
        posterior = self._stored(name, draw)
        if posterior.status == "complete":
            total.advance(before + count * self.draws - total.rows)
            if self.folder is not None:
                (self.folder / f"{name}.images.nc").unlink(missing_ok=True)  # the draws have them too
        return simulated, posterior

    def _truth(self, name: str, first: int, count: int, truths: Truths, options: dict[str, Any]) -> torch.Tensor:
        """Return true images ``(count, *image)``: given, exact draws of the prior, or draws by ``heun``."""
        space = self.target.image
        if truths.given:
            return torch.stack([truths.image(i) for i in range(first, first + count)])
        denoiser, key = self.prior.denoiser, derived(self.seed, 0, first)
        if isinstance(denoiser, ExactDenoiser):
            return self.target.codec.decode(denoiser.sample(count, key)).cpu()
        if self.folder is not None and self._finished(self.folder / f"{name}.nc"):
            with open_posterior(self.folder / f"{name}.nc") as posterior:
                assert posterior.x_true is not None
                values = posterior.x_true.values
        else:

            def draw(**where: Any) -> Posterior:
                return sample(
                    None,
                    self.prior,
                    "heun",
                    draws=count,
                    seed=key,
                    shape=space,
                    on_nonfinite="raise",
                    **options,
                    **where,
                )

            with self._stored(f"{name}.images", draw) as posterior:
                values = posterior.draws.values
        return torch.from_numpy(values.reshape(count, *space.shape)).to(space.dtype)

    def _stored(self, name: str, draw: Callable[..., Posterior]) -> Posterior:
        """Return draws from the file of that name, or make them, in the file where there is a folder."""
        if self.folder is None:
            return draw()
        path = self.folder / f"{name}.nc"
        if self._finished(path):
            return open_posterior(path)
        return draw(store=path, resume=Path(f"{path}.partial").exists())

    @staticmethod
    def _finished(path: Path) -> bool:
        return path.exists() and not Path(f"{path}.partial").exists()


class Truths:
    """Where the true images come from."""

    def __init__(self, target: Target, images: Images | None, population: str, cases: int, seed: int) -> None:
        self.space, self.given = target.image, images is not None
        self.population = population.strip() or f"images drawn from the prior {target.prior.name}"
        self.identity = "drawn from the prior"
        if images is None:
            return
        if not population.strip():
            raise InvdiffError(
                "Say in words what the images are (population=...); the result holds for them alone."
            )
        if callable(images):
            self._get: Callable[[int], Any] = images
            self.identity = array_sha256(self.image(0))
            return
        found = torch.as_tensor(images)
        if tuple(found.shape[1:]) != self.space.shape or len(found) < cases:
            raise InvdiffError(
                f"The images have shape {tuple(found.shape)}, expected {cases} or more of "
                f"{self.space}; crop them or ask for fewer cases."
            )
        order = np.random.default_rng(derived(seed, 0, 0)).permutation(len(found))
        self.identity = array_sha256(found)
        self._get = lambda i: found[int(order[i])]

    def image(self, case: int) -> torch.Tensor:
        """Return the image of a case, checked."""
        x = torch.as_tensor(self._get(case))
        if tuple(x.shape) != self.space.shape or (x.is_complex() and not self.space.is_complex):
            raise InvdiffError(f"The image of case {case} is {tuple(x.shape)}, {x.dtype}; expected {self.space}.")
        if not bool(torch.isfinite(x).all()):
            raise InvdiffError(f"The image of case {case} holds NaN or infinite values; leave it out.")
        return x.to(self.space.dtype)


class Total(Callback):
    """One bar over all blocks."""

    def __init__(self, bar: Callback | None, run: RunInfo) -> None:
        self.bar, self.rows = bar, 0
        if bar is not None:
            bar.on_start(run)

    def on_start(self, run: RunInfo) -> None:
        """Count what a resumed block had done."""
        self.advance(run.done_rows)

    def on_step(self, info: StepInfo) -> bool | None:
        """Advance within a batch."""
        return None if self.bar is None else self.bar.on_step(info)

    def on_chunk(self, rows: int, restarted: bool = False) -> None:
        """Count finished draws."""
        self.advance(0 if restarted else rows)

    def advance(self, rows: int) -> None:
        """Count draws as done."""
        self.rows += rows
        if self.bar is not None and rows:
            self.bar.on_chunk(rows)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.on_end()


def derived(seed: int, what: int, block: int) -> int:
    """Return a seed of its own for the images (0), the noise (1) or the draws (2) of a block."""
    return int(np.random.SeedSequence([seed, 0xCA11B, what, block]).generate_state(1, np.uint32)[0])
