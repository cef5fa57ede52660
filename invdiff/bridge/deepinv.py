"""deepinv's physics as operators, its denoisers as priors, and the reverse.

```python
A, likelihood = bridge.deepinv.from_physics(physics, (3, 64, 64)), bridge.deepinv.from_noise(physics.noise_model)
prior = bridge.deepinv.from_denoiser(deepinv.models.DRUNet(), (3, 64, 64), sigma_min=0.01, sigma_max=0.2)
model = bridge.deepinv.as_reconstructor(prior, "dds", draws=16)      # x_mean = model(y, physics)
```

Complex numbers: deepinv writes an MRI image as two real channels ``(B, 2, y, x)`` and its data as
``(B, 2, coil, ky, kx)``, real parts first. `to_pairs` and `from_pairs` go between these and the complex tensors
used here, ``(B, 1, y, x)`` and ``(B, coil, ky, kx)``; ``pairs=True`` asks for them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invdiff import likelihoods
from invdiff.codec import AffineCodec
from invdiff.errors import InvdiffError
from invdiff.likelihood import Likelihood
from invdiff.operator import LinearOperator, Operator
from invdiff.prior import Prior
from invdiff.priors.frames import VE
from invdiff.priors.parametrisation import from_network
from invdiff.problem import Problem
from invdiff.spaces import Space
from invdiff.tensors import tensor_digest

if TYPE_CHECKING:
    from invdiff.posterior import Posterior


def to_pairs(x: Tensor) -> Tensor:
    """Return a complex ``(B, ...)`` as real ``(B, 2, ...)``, real part first; an image's channel of one goes.

    ``(B, 1, y, x)`` gives ``(B, 2, y, x)``, and ``(B, coil, ky, kx)`` gives ``(B, 2, coil, ky, kx)``.
    """
    x = x[:, 0] if x.ndim > 2 and x.shape[1] == 1 else x
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 1).contiguous()


def from_pairs(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return real ``(B, 2, ...)`` as complex ``(B, *shape)``; the inverse of `to_pairs`."""
    return torch.view_as_complex(x.movedim(1, -1).contiguous()).reshape(x.shape[0], *shape)


class PhysicsOperator(Operator):
    """``x -> physics.A(x)``, on a copy of the physics; derivatives are autograd's."""

    def __init__(self, physics: Any, domain: Space, range: Space, pairs: tuple[bool, bool]) -> None:
        self.physics, self.domain, self.range, self.pairs = physics, domain, range, pairs

    @property
    def name(self) -> str:
        """Name of the physics."""
        return f"deepinv {type(self.physics).__name__}"

    def _forward(self, x: Tensor) -> Tensor:
        if not len(x):  # most physics refuse a batch of no rows
            return self.range.zeros(0, x.device)
        return self._data(self.physics.A(self._theirs(x.to(self.domain.dtype), self.pairs[0])))

    def _theirs(self, x: Tensor, pairs: bool) -> Tensor:
        return to_pairs(x) if pairs else x

    def _data(self, y: Tensor) -> Tensor:
        return (from_pairs(y, self.range.shape) if self.pairs[1] else y).to(self.range.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return a copy on another device or in another precision."""
        new = super().to(device, dtype)
        new.physics = _moved(self.physics, device, dtype)
        return new

    def describe(self) -> dict[str, Any]:
        """Describe the spaces and the physics: its class and its buffers."""
        return {**super().describe(), "physics": type(self.physics).__name__, "state_sha256": _state(self.physics)}


class PhysicsLinear(PhysicsOperator, LinearOperator):
    """A linear physics, with its own adjoint and normal operator."""

    provides = LinearOperator.provides
    __call__ = LinearOperator.__call__
    vjp = LinearOperator.vjp
    jvp = LinearOperator.jvp

    def _adjoint(self, y: Tensor) -> Tensor:
        if not len(y):
            return self.domain.zeros(0, y.device)
        back = self.physics.A_adjoint(self._theirs(y.to(self.range.dtype), self.pairs[1]))
        return (from_pairs(back, self.domain.shape) if self.pairs[0] else back).to(self.domain.dtype)


def from_physics(
    physics: Any,
    domain: Space | Sequence[int],
    *,
    pairs: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Operator:
    """Return a deepinv physics as an operator, linear where it is a ``LinearPhysics``.

    The physics is copied, so that what later changes its parameters does not reach the operator. Whether its
    adjoint is exact is for `invdiff.testing.check_operator` to say.

    Args:
        physics: The physics, with parameters for one case.
        domain: Space of the image here, or its shape alone (``dtype``, complex where ``pairs``).
        pairs: Whether its images of two channels (and its data of two) are complex here.
        dtype: float32 or float64 where ``domain`` is a bare shape.

    Raises:
        InvdiffError: If it is no physics, has parameters for several cases, or returns a list of tensors.
    """
    import deepinv

    if not isinstance(physics, deepinv.physics.Physics):
        raise InvdiffError(f"from_physics needs a deepinv physics, got {type(physics).__name__}.")
    image = domain if isinstance(domain, Space) else Space(tuple(domain), dtype.to_complex() if pairs else dtype)
    if pairs and not image.is_complex:
        raise InvdiffError(f"Pairs of channels stand for complex images, and the domain {image} is real.")
    own = _moved(physics, None, image.real_dtype).requires_grad_(False)
    with torch.no_grad():
        x = image.zeros(1, next((t.device for t in own.buffers()), None))
        y = own.A(to_pairs(x) if pairs else x)
    if not isinstance(y, Tensor):
        raise InvdiffError(
            f"The physics {type(physics).__name__} returns {type(y).__name__}; convert its parts one by one and "
            "join them with operators.stack."
        )
    if y.shape[0] != 1:
        raise InvdiffError(
            f"The physics {type(physics).__name__} has parameters for {y.shape[0]} cases; convert one per case."
        )
    paired = pairs and not y.is_complex() and y.shape[1] == 2
    shape = tuple(y.shape[2:] if paired else y.shape[1:])
    precision = image.real_dtype.to_complex() if paired or y.is_complex() else image.real_dtype
    range = Space(shape, precision, tuple(f"data_{i}" for i, _ in enumerate(shape)))
    make = PhysicsLinear if isinstance(physics, deepinv.physics.LinearPhysics) else PhysicsOperator
    return make(own, image, range, (pairs, paired))


def to_physics(operator: Operator, likelihood: Likelihood | None = None, *, pairs: bool | None = None) -> Any:
    """Return an operator as a deepinv physics, with its noise model where a likelihood is given.

    Complex images and data become pairs of real channels (see `to_pairs`), which deepinv's networks take, unless
    ``pairs=False``. Operators with parameters per case take batches of just those cases.

    Raises:
        InvdiffError: If deepinv has no such noise model.
    """
    import deepinv

    if not isinstance(operator, Operator):
        raise InvdiffError(f"to_physics needs an operator, got {type(operator).__name__}.")
    noise = to_noise(likelihood) if likelihood is not None else deepinv.physics.ZeroNoise()
    use = pairs if pairs is not None else True
    image, data = (use and s.is_complex for s in (operator.domain, operator.range))

    def a(x: Tensor, **_: Any) -> Tensor:
        y = operator(from_pairs(x, operator.domain.shape) if image else x)
        return to_pairs(y) if data else y

    if not isinstance(operator, LinearOperator):
        return deepinv.physics.Physics(A=a, noise_model=noise)
    linear = operator

    def back(y: Tensor, **_: Any) -> Tensor:
        x = linear.adjoint(from_pairs(y, linear.range.shape) if data else y)
        return to_pairs(x) if image else x

    class OperatorPhysics(deepinv.physics.LinearPhysics):
        """A linear operator with its own normal operator."""

        def A_adjoint_A(self, x: Tensor, **_: Any) -> Tensor:
            """Return ``A^H A x`` by the operator's fast path."""
            out = linear.normal(from_pairs(x, linear.domain.shape) if image else x)
            return to_pairs(out) if image else out

    size = (2, *linear.domain.shape[1:]) if image else linear.domain.shape
    return OperatorPhysics(A=a, A_adjoint=back, noise_model=noise, img_size=size)


def to_unit_interval(problem: Problem, interval: tuple[float, float]) -> tuple[Any, Tensor]:
    """Return a linear Gaussian problem as a deepinv physics and data for images in [0, 1].

    With ``x = low + (high - low) u`` (both parts of complex ``x``), the data become
    ``(y - A low) / (high - low) = A u + noise`` at the level ``sigma / (high - low)``.
    ``to_denoiser(prior, interval=interval)`` fits, and ``low + (high - low) u`` goes back. deepinv's samplers
    expect such images and mostly clip to them, so the interval should hold every image.

    Raises:
        InvdiffError: If the operator is not linear, the noise not Gaussian with one level, or the interval empty.
    """
    low, high = _interval(interval)
    operator, noise = problem.operator, problem.likelihood
    if not isinstance(operator, LinearOperator) or not isinstance(noise, likelihoods.Gaussian):
        raise InvdiffError(
            f"Images move to [0, 1] in linear problems with Gaussian noise; this one has {operator.name} and "
            f"{noise.name}."
        )
    floor = torch.full_like(operator.domain.zeros(1, problem.y.device), low)
    floor = floor * (1 + 1j) if operator.domain.is_complex else floor
    rows = operator.n_cases or 1
    y = (problem.y - operator(floor.expand(rows, *floor.shape[1:]))) / (high - low)
    physics = to_physics(operator, likelihoods.Gaussian(noise.sigma / (high - low)))
    return physics, to_pairs(y) if operator.range.is_complex else y


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not low < high:
        raise InvdiffError(f"The interval of image values must be low < high, got {low:g} and {high:g}.")
    return low, high


def from_noise(noise: Any, *, complex_data: bool = False) -> Likelihood:
    """Return a deepinv noise model as a likelihood.

    Args:
        noise: ``GaussianNoise``, ``PoissonNoise``, ``PoissonGaussianNoise``, ``RicianNoise`` or ``ZeroNoise``.
        complex_data: Whether deepinv's data are complex tensors: its noise then has the level in all, and
            ``sigma / sqrt(2)`` per real component. Pairs of channels have it per component already.

    Raises:
        InvdiffError: If the noise has no density here; the message lists what has.
    """
    name = type(noise).__name__

    def level(key: str) -> Tensor:
        value = getattr(noise, key).detach()
        return value.reshape(()).clone() if value.numel() == 1 else value.clone()

    if name == "ZeroNoise":
        return likelihoods.Gaussian(0.0)
    if name == "GaussianNoise":
        sigma = level("sigma")
        if sigma.ndim:
            raise InvdiffError("The noise level differs between cases; convert one case at a time.")
        return likelihoods.Gaussian(float(sigma) / (2**0.5 if complex_data else 1))
    if name == "PoissonNoise":
        gain = level("gain")
        if not noise.normalize and bool((gain != 1).any()):
            raise InvdiffError(
                "PoissonNoise with normalize=False gives counts; set normalize=True, or scale the operator by "
                "1 / gain and use likelihoods.Poisson()."
            )
        return likelihoods.Poisson(gain)
    if name == "PoissonGaussianNoise":
        return likelihoods.PoissonGaussian(level("gain"), level("sigma"))
    if name == "RicianNoise":
        return likelihoods.Rician(level("sigma"))
    raise InvdiffError(
        f"deepinv's {name} has no likelihood here; there are GaussianNoise, PoissonNoise, PoissonGaussianNoise, "
        "RicianNoise and ZeroNoise."
    )


def to_noise(likelihood: Likelihood) -> Any:
    """Return a likelihood as a deepinv noise model; the reverse of `from_noise`."""
    from deepinv import physics

    def number(value: Tensor, what: str) -> float:
        if value.numel() != 1:
            raise InvdiffError(f"deepinv's noise models take one {what}, and this likelihood has an array.")
        return float(value)

    if isinstance(likelihood, likelihoods.Gaussian):
        sigma = number(likelihood.sigma, "sigma")
        return physics.GaussianNoise(sigma) if sigma else physics.ZeroNoise()
    if isinstance(likelihood, likelihoods.Rician):
        return physics.RicianNoise(number(likelihood.sigma, "sigma"))
    if isinstance(likelihood, likelihoods.Poisson) and not bool((likelihood.background != 0).any()):
        return physics.PoissonNoise(number(likelihood.gain, "gain"), clip_positive=True)
    if isinstance(likelihood, likelihoods.PoissonGaussian) and not bool((likelihood.background != 0).any()):
        gain, sigma = number(likelihood.gain, "gain"), number(likelihood.sigma, "sigma")
        return physics.PoissonGaussianNoise(gain, sigma, clip_positive=True)
    raise InvdiffError(
        f"deepinv has no noise model for {likelihood!r}; it has Gaussian, Poisson and Poisson-Gaussian noise "
        "without background, and Rician noise."
    )


def from_denoiser(
    model: nn.Module,
    image: Space | Sequence[int],
    *,
    sigma_min: float,
    sigma_max: float,
    card: Mapping[str, Any] | None = None,
) -> Prior:
    """Return a deepinv denoiser as a prior for images in the units it was trained on, mostly [0, 1].

    Complex images ``(1, y, x)`` meet it as two channels.

    Args:
        model: Called as ``model(x, sigma)`` with ``sigma`` ``(B,)``.
        image: Space of the image, or its shape alone (float32).
        sigma_min: Smallest noise level it was trained on.
        sigma_max: Largest one, for DRUNet for instance 0.2. Samplers stay inside, and a denoiser that never met
            noise far above the image makes a poor prior.
        card: Licence, training data; passed on to provenance.

    Raises:
        InvdiffError: If levels are not ``0 < sigma_min < sigma_max``.
    """
    space = image if isinstance(image, Space) else Space(tuple(image))
    frame = VE(sigma_min, sigma_max)
    about = {"name": f"deepinv {type(model).__name__}", **(card or {})}
    return from_network(model, "x0", frame, space, outside="clamp", card=about)


def to_denoiser(prior: Prior, image: Space | None = None, *, interval: tuple[float, float] = (0.0, 1.0)) -> Any:
    """Return a prior as a deepinv denoiser of images, ``E[x0 | x0 + sigma eps = x]``.

    Complex images are pairs of channels. Levels below the prior's smallest are taken as that; above its largest,
    where next to nothing is left of the image, the input is scaled down to that level.

    Args:
        prior: A prior whose codec maps prior coordinates to images linearly, up to a constant.
        image: Space of the image, for priors that serve any size.
        interval: Image values that are 0 and 1 there; see `to_unit_interval`. The default changes nothing.

    Raises:
        InvdiffError: If the codec is not linear, the space is missing, or the interval is empty.
    """
    import deepinv

    codec = _codec(prior, image)
    own, pairs, denoiser = codec.image, codec.image.is_complex, prior.denoiser
    low, high = _interval(interval)
    unit = high - low

    class PriorDenoiser(deepinv.models.Denoiser):
        """The denoiser of a prior between its codec's two directions."""

        def forward(self, x: Tensor, sigma: Tensor | float, **_: Any) -> Tensor:
            image = low + unit * x
            u = codec.encode((from_pairs(image, own.shape) if pairs else image).to(own.dtype))
            level = unit * torch.as_tensor(sigma, dtype=u.dtype, device=u.device).reshape(-1).expand(len(u))
            level = level / codec.gain.to(u)
            known = level.clamp(denoiser.sigma_min, denoiser.sigma_max)
            shrink = (known / level.clamp_min(1e-30)).clamp(max=1).reshape(-1, *[1] * (u.ndim - 1))
            out = codec.decode(denoiser(u * shrink, known))
            return (((to_pairs(out) if pairs else out) - low) / unit).to(x.dtype)

    return PriorDenoiser()


def as_reconstructor(
    prior: Prior,
    sampler: Any = None,
    *,
    image: Space | Sequence[int] | None = None,
    draws: int = 8,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    **options: Any,
) -> Any:
    """Return a deepinv reconstructor ``model(y, physics)`` that gives the posterior mean.

    ``model.sample(y, physics)`` gives the whole `Posterior`.

    Args:
        prior: The prior.
        sampler: A sampler or its name; the default of `invdiff.sample` where left out.
        image: Space of the image; that of the prior where left out.
        draws: Draws per case.
        seed: Seed.
        likelihood: Noise model; that of the physics where left out.
        options: Further arguments of `invdiff.sample`.
    """
    import deepinv

    bound = prior.codec.image if prior.codec is not None else prior.denoiser.space
    given = bound if image is None else image if isinstance(image, Space) else Space(tuple(image))
    if given is None:
        raise InvdiffError(f"Prior {prior.name} serves any size; give the image's space.")
    space: Space = given

    class PosteriorMean(deepinv.models.Reconstructor):
        """Draws from the posterior, and their mean."""

        def sample(self, y: Tensor, physics: Any) -> Posterior:
            """Return the posterior of ``y``, one case per row."""
            from invdiff.driver import sample

            operator = from_physics(physics, space, pairs=space.is_complex)
            paired = isinstance(operator, PhysicsOperator) and operator.pairs[1]
            noise = likelihood or from_noise(physics.noise_model, complex_data=y.is_complex())
            data = from_pairs(y, operator.range.shape) if paired else y
            found: Posterior = sample(
                Problem(operator, noise, data.detach()), prior, sampler, draws=draws, seed=seed, **options
            )
            return found

        def forward(self, y: Tensor, physics: Any, **_: Any) -> Tensor:
            found = self.sample(y, physics)
            values = (found.estimate if found.kind == "point" else found.mean()).values
            mean = torch.from_numpy(values.copy()).reshape(len(y), -1, *space.shape).mean(1).to(space.dtype)
            return (to_pairs(mean) if space.is_complex else mean).to(y.device)

    return PosteriorMean()


def _codec(prior: Prior, image: Space | None) -> AffineCodec:
    space = image or (prior.codec.image if prior.codec is not None else prior.denoiser.space)
    if space is None:
        raise InvdiffError(f"Prior {prior.name} serves any size; give the image's space.")
    codec = prior.bind(space, 1.0 if prior.scale is None else prior.scale).codec
    if not isinstance(codec, AffineCodec) or codec.gain.numel() != 1:
        raise InvdiffError(
            f"The codec of prior {prior.name} is not linear with one scale; noise would be changed."
        )
    return codec


def _moved(module: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """Return a copy of a module with its tensors moved, complex ones staying complex."""

    def move(t: Tensor) -> Tensor:
        target = None
        if dtype is not None and (t.is_floating_point() or t.is_complex()):
            target = dtype.to_complex() if t.is_complex() else dtype.to_real()
        return t.to(device=device, dtype=target)

    out = copy.deepcopy(module)
    apply: Callable[[Callable[[Tensor], Tensor]], Any] = out._apply
    return apply(move)


def _state(module: nn.Module) -> str:
    """Return a digest of the buffers and parameters of a module, and of the numbers it holds."""
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))}
    text = f"{type(module).__name__} {sorted(numbers.items())} {tensor_digest(dict(module.state_dict()))}"
    return hashlib.sha256(text.encode()).hexdigest()
