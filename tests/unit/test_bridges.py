"""deepinv, sigpy and scipy operators here, ours there, and back; noise models, priors, reconstructors."""

import warnings

import numpy as np
import pytest
import torch

import invdiff
from invdiff import Space, likelihoods, operators
from invdiff.bridge import deepinv as bridge
from invdiff.bridge import scipy as scipy_bridge
from invdiff.bridge import sigpy as sigpy_bridge
from invdiff.codec import ComplexChannels
from invdiff.errors import InvdiffError
from invdiff.operators import trajectories
from invdiff.prior import Prior
from invdiff.testing import check_operator, dense_matrix
from tests.conformance.toys import normal_prior

physics = pytest.importorskip("deepinv").physics
F32, F64 = torch.float32, torch.float64


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=g(seed))


def maps(*shape, seed=1):
    return torch.randn(*shape, generator=g(seed), dtype=torch.complex64)


KERNEL = rand(1, 1, 3, 3)
MASK = (rand(1, 1, 8, 8) < 0.5).float()
BOTH = (F32, F64)


def compressed(m=20, size=(1, 5, 5), dtype=F32):
    return physics.CompressedSensing(m, size, dtype=dtype, rng=g())


#: name: (factory, image shape, complex image, pairs of channels, precisions)
ZOO = {
    "Blur": (lambda: physics.Blur(KERNEL, padding="circular"), (1, 8, 8), False, False, BOTH),
    "Blur valid": (lambda: physics.Blur(KERNEL), (1, 8, 8), False, False, BOTH),
    "BlurFFT": (lambda: physics.BlurFFT((1, 8, 8), KERNEL), (1, 8, 8), False, False, BOTH),
    "CompressedSensing": (compressed, (1, 5, 5), False, False, (F32,)),
    "Decolorize": (lambda: physics.Decolorize(), (3, 6, 6), False, False, BOTH),
    "Demosaicing": (lambda: physics.Demosaicing((3, 8, 8)), (3, 8, 8), False, False, BOTH),
    "Denoising": (lambda: physics.Denoising(), (1, 6, 6), False, False, BOTH),
    "Downsampling": (
        lambda: physics.Downsampling((1, 8, 8), filter="gaussian", factor=2),
        (1, 8, 8),
        False,
        False,
        BOTH,
    ),
    "DownsamplingMatlab": (lambda: physics.DownsamplingMatlab(factor=2), (1, 8, 8), False, False, BOTH),
    "DynamicMRI": (
        lambda: physics.DynamicMRI((rand(3, 8, 8) < 0.5).float(), (2, 3, 8, 8)),
        (2, 3, 8, 8),
        False,
        False,
        BOTH,
    ),
    "HyperSpectralUnmixing": (
        lambda: physics.HyperSpectralUnmixing(rand(3, 6), 3, 6),
        (3, 4, 4),
        False,
        False,
        BOTH,
    ),
    "Inpainting": (lambda: physics.Inpainting((1, 8, 8), mask=MASK[0]), (1, 8, 8), False, False, BOTH),
    "MRI": (lambda: physics.MRI(MASK, (2, 8, 8)), (1, 8, 8), True, True, BOTH),
    "MRI as channels": (lambda: physics.MRI(MASK, (2, 8, 8)), (2, 8, 8), False, False, BOTH),
    "MultiCoilMRI": (lambda: physics.MultiCoilMRI(MASK, maps(1, 3, 8, 8), (2, 8, 8)), (1, 8, 8), True, True, BOTH),
    "StructuredRandom": (
        lambda: physics.StructuredRandom((1, 4, 4), (1, 4, 4), rng=g()),
        (1, 4, 4),
        False,
        False,
        BOTH,
    ),
    "SinglePixelCamera": (
        lambda: physics.SinglePixelCamera(10, (1, 8, 8), rng=g()),
        (1, 8, 8),
        False,
        False,
        BOTH,
    ),
    "SpaceVaryingBlur": (
        lambda: physics.SpaceVaryingBlur(rand(1, 1, 2, 3, 3), rand(1, 1, 2, 8, 8), padding="circular"),
        (1, 8, 8),
        False,
        False,
        BOTH,
    ),
    "Tomography": (lambda: physics.Tomography(5, 8, normalize=False), (1, 8, 8), False, False, (F32,)),
    "ComposedLinearPhysics": (
        lambda: physics.ComposedLinearPhysics(physics.Denoising(), physics.Blur(KERNEL, padding="circular")),
        (1, 8, 8),
        False,
        False,
        BOTH,
    ),
    "PhaseRetrieval": (
        lambda: physics.PhaseRetrieval(compressed(dtype=torch.complex64)),
        (1, 5, 5),
        True,
        False,
        BOTH,
    ),
    "RandomPhaseRetrieval": (
        lambda: physics.RandomPhaseRetrieval(20, (1, 4, 4), rng=g()),
        (1, 4, 4),
        True,
        False,
        BOTH,
    ),
    "Ptychography": (lambda: physics.Ptychography((1, 16, 16)), (1, 16, 16), True, False, BOTH),
    "SpatialUnwrapping": (lambda: physics.SpatialUnwrapping(), (1, 6, 6), False, False, (F64,)),
}

#: What is left out, and why.
LEFT_OUT = {
    "BlurFFTMultiScaler": "several scales of another physics, chosen at the call",
    "BlurMultiScaler": "several scales of another physics, chosen at the call",
    "InpaintingMultiScaler": "several scales of another physics, chosen at the call",
    "LinearPhysicsMultiScaler": "several scales of another physics, chosen at the call",
    "PhysicsMultiScaler": "several scales of another physics, chosen at the call",
    "PhysicsCropper": "wraps another physics",
    "VirtualLinearPhysics": "wraps another physics",
    "Physics": "a base class; see to_physics",
    "LinearPhysics": "a base class; see to_physics",
    "DecomposablePhysics": "a base class; Inpainting and others are such",
    "ComposedPhysics": "as ComposedLinearPhysics",
    "CompressiveSpectralImaging": "its adjoint is none; see the test below",
    "Haze": "takes a list of tensors",
    "Pansharpen": "returns a list of tensors; see the test below",
    "StackedPhysics": "returns a list of tensors",
    "StackedLinearPhysics": "returns a list of tensors",
    "SinglePhotonLidar": "mixes rows where their number is not that of its bins",
    "SequentialMRI": "takes one row at a time; see the test below",
    "TiledSpaceVaryingBlur": "as SpaceVaryingBlur",
    "Upsampling": "the adjoint of Downsampling",
    "PtychographyLinearOperator": "part of Ptychography",
    "StructuredRandomPhaseRetrieval": "RandomPhaseRetrieval behind StructuredRandom",
    "Scattering": "solves a Helmholtz equation to a tolerance of its own",
    "UltrasoundPlaneWave": "has no small default geometry",
    "PET": "needs parallelproj",
    "TomographyWithAstra": "needs astra and a GPU",
    "NonCartesianMRI": "needs mri-nufft",
    "RadioInterferometry": "needs torchkbnufft",
}


def converted(name, dtype):
    make, shape, is_complex, pairs, _ = ZOO[name]
    kind = dtype.to_complex() if is_complex else dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some physics warn of torch features when they are built
        theirs = make()
    return theirs, bridge.from_physics(theirs, Space(shape, kind), pairs=pairs)


CASES = [(n, d) for n, entry in ZOO.items() for d in entry[-1]]


@pytest.mark.touches_global_rng
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_the_zoo_of_physics_keeps_our_contract(name, dtype):
    _, op = converted(name, dtype)
    check_operator(op).raise_if_failed()


def test_every_physics_is_in_the_zoo_or_left_out_for_a_reason():
    found = {
        n for n in dir(physics) if isinstance(c := getattr(physics, n), type) and issubclass(c, physics.Physics)
    }
    assert found <= {n.split(" ")[0] for n in ZOO} | set(LEFT_OUT)


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("name", ZOO)
def test_there_and_back_again(name):
    pairs, dtypes = ZOO[name][3:]
    theirs, op = converted(name, dtypes[0])
    back = bridge.to_physics(op, pairs=pairs)
    x = op.domain.randn(1)
    z = bridge.to_pairs(x) if pairs else x
    if dtypes[0] == F32:
        torch.testing.assert_close(back.A(z), theirs.A(z))
    again = bridge.from_physics(back, op.domain, pairs=pairs)
    assert again.range.shape == op.range.shape
    torch.testing.assert_close(again(x), op(x))
    if isinstance(theirs, physics.LinearPhysics):
        y = op.range.randn(1)
        torch.testing.assert_close(again.adjoint(y), op.adjoint(y))
        w = bridge.to_pairs(y) if op.pairs[1] else y
        torch.testing.assert_close(
            back.A_adjoint(w), theirs.A_adjoint(w) if dtypes[0] == F32 else back.A_adjoint(w)
        )


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("make", ["multicoil", "radial", "blur"])
def test_ours_as_physics(make):
    op = {
        "multicoil": lambda: operators.MultiCoilMRI(MASK[0, 0], maps(3, 8, 8)),
        "radial": lambda: operators.NonCartesianMRI(trajectories.radial(8, 5), maps(3, 8, 8)),
        "blur": lambda: operators.GaussianBlur(0.8, (1, 8, 8)),
    }[make]()
    there = bridge.to_physics(op, likelihoods.Gaussian(0.1))
    x = op.domain.randn(2)
    z = bridge.to_pairs(x) if op.domain.is_complex else x
    assert z.dtype == F32 and there.A(z).dtype == F32
    assert float(there.adjointness_test(z)) < 1e-3
    normal = there.A_adjoint_A(z)
    torch.testing.assert_close(normal, there.A_adjoint(there.A(z)), atol=1e-4, rtol=1e-3)
    assert there(z).shape == there.A(z).shape and float(there.noise_model.sigma) == pytest.approx(0.1)


def test_pairs():
    x = maps(2, 1, 4, 5)
    assert bridge.to_pairs(x).shape == (2, 2, 4, 5)
    assert torch.equal(bridge.from_pairs(bridge.to_pairs(x), (1, 4, 5)), x)
    y = maps(2, 3, 4, 5)
    assert torch.equal(bridge.to_pairs(y)[:, 1], y.imag) and torch.equal(
        bridge.from_pairs(bridge.to_pairs(y), (3, 4, 5)), y
    )


@pytest.mark.touches_global_rng
def test_wrong_adjoints_and_lists_are_found():
    op = bridge.from_physics(physics.CompressiveSpectralImaging((4, 8, 8), rng=g()), (4, 8, 8))
    assert "adjoint, aligned data" in check_operator(op).failed
    with pytest.raises(InvdiffError, match="returns TensorList; convert its parts"):
        bridge.from_physics(physics.Pansharpen((3, 8, 8), factor=2), (3, 8, 8))
    with pytest.raises(InvdiffError, match="needs a deepinv physics, got Linear"):
        bridge.from_physics(torch.nn.Linear(2, 2), (2,))
    with pytest.raises(InvdiffError, match="parameters for 2 cases"):
        bridge.from_physics(physics.Inpainting((1, 4, 4), mask=rand(2, 1, 4, 4).round()), (1, 4, 4))
    sequential = bridge.from_physics(physics.SequentialMRI(rand(3, 8, 8).round(), (2, 8, 8)), (2, 8, 8))
    assert not check_operator(sequential).ok


@pytest.mark.touches_global_rng
def test_the_physics_is_copied():
    blur = physics.Blur(KERNEL, padding="circular")
    op = bridge.from_physics(blur, (1, 8, 8))
    x, described = op.domain.randn(1), op.describe()
    before = op(x)
    blur.update(filter=2 * KERNEL)
    torch.testing.assert_close(op(x), before)
    assert bridge.from_physics(blur, (1, 8, 8)).describe() != described == op.describe()


NOISES = {
    "gaussian": (lambda: physics.GaussianNoise(0.3), likelihoods.Gaussian(0.3)),
    "none": (lambda: physics.ZeroNoise(), likelihoods.Gaussian(0.0)),
    "poisson": (lambda: physics.PoissonNoise(0.5), likelihoods.Poisson(0.5)),
    "poisson-gaussian": (lambda: physics.PoissonGaussianNoise(0.5, 0.2), likelihoods.PoissonGaussian(0.5, 0.2)),
    "rician": (lambda: physics.RicianNoise(0.3), likelihoods.Rician(0.3)),
}


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("name", NOISES)
def test_noise_models(name):
    make, ours = NOISES[name]
    noise, found = make(), bridge.from_noise(make())
    assert type(found) is type(ours)
    again = bridge.from_noise(bridge.to_noise(ours))
    z = torch.full((1, 20000), 3.0)
    rng = invdiff.rng.Streams(0, [(0, 0)]).at(invdiff.rng.INIT)
    torch.manual_seed(0)
    drawn = noise(z)
    for law in (found, again):
        sample = law.sample(z, rng)
        assert float(sample.mean()) == pytest.approx(float(drawn.mean()), abs=0.05)
        assert float(sample.std()) == pytest.approx(float(drawn.std()), abs=0.03)


def test_complex_noise_of_deepinv_is_per_sample_and_not_per_component():
    assert float(bridge.from_noise(physics.GaussianNoise(2.0), complex_data=True).sigma) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: bridge.from_noise(physics.UniformNoise(0.1)), "UniformNoise has no likelihood here"),
        (lambda: bridge.from_noise(physics.PoissonNoise(0.5, normalize=False)), "gives counts"),
        (lambda: bridge.from_noise(physics.GaussianNoise(torch.tensor([0.1, 0.2]))), "differs between cases"),
        (lambda: bridge.to_noise(likelihoods.Gaussian(torch.ones(2, 1))), "take one sigma"),
        (lambda: bridge.to_noise(likelihoods.Poisson(1.0, 0.5)), "no noise model for Poisson"),
        (lambda: bridge.from_denoiser(None, (1, 4, 4), sigma_min=1, sigma_max=0.5), "0 < sigma_min < sigma_max"),
    ],
)
def test_what_has_no_counterpart(run, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        run()
    assert "\n" not in str(caught.value)


# ---- denoisers and reconstructors ----


def prior_on(space):
    if not space.is_complex:
        return normal_prior(space)
    codec = ComplexChannels(space)
    return Prior(normal_prior(codec.prior).denoiser, codec)


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_denoisers_there_and_back_again(dtype):
    space = Space((1, 6, 5), dtype)
    there = bridge.to_denoiser(prior_on(space))
    back = bridge.from_denoiser(there, space, sigma_min=1e-2, sigma_max=10)
    codec = prior_on(space).bind(space).codec
    x = codec.prior.randn(3)
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    expected = prior_on(space).denoiser(x, sigma)
    torch.testing.assert_close(back.denoiser(x, sigma), expected)


def test_levels_beyond_the_range_of_the_prior():
    space = Space((1, 6, 5), F64)
    prior = prior_on(space)
    there, x = bridge.to_denoiser(prior), 100 * space.randn(2)
    top = prior.denoiser.sigma_max
    torch.testing.assert_close(there(x, 10 * top), there(x / 10, top))
    assert there(x.float(), 1.0).dtype == F32


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_images_in_the_unit_interval(dtype):
    space = Space((1, 6, 5), dtype)
    op, interval = operators.SubsampledFourier(rand(6, 5) < 0.7, space), (-2.0, 6.0)
    problem = invdiff.Problem.simulate(op, likelihoods.Gaussian(0.4), space.randn(2), seed=0)
    there, y = bridge.to_unit_interval(problem, interval)
    assert float(there.noise_model.sigma) == pytest.approx(0.05)
    x = space.randn(2, 7)
    u = ((bridge.to_pairs(x) if space.is_complex else x) + 2) / 8
    residual = problem.residual(x) / 8
    torch.testing.assert_close(y - there.A(u), bridge.to_pairs(residual))
    denoised = bridge.to_denoiser(prior_on(space), interval=interval)(u, 0.125)
    plain = bridge.to_denoiser(prior_on(space))(8 * u - 2, 1.0)
    torch.testing.assert_close(8 * denoised - 2, plain)
    with pytest.raises(InvdiffError, match="low < high"):
        bridge.to_unit_interval(problem, (1.0, 1.0))
    with pytest.raises(InvdiffError, match="Gaussian noise; this one has"):
        bridge.to_unit_interval(invdiff.Problem(op, likelihoods.Poisson(), problem.y), interval)


@pytest.mark.touches_global_rng
def test_a_denoiser_of_deepinv_as_prior():
    import deepinv

    model = deepinv.models.MedianFilter(kernel_size=3)
    prior = bridge.from_denoiser(model, (1, 8, 8), sigma_min=0.01, sigma_max=1.0, card={"licence": "BSD-3-Clause"})
    x = prior.denoiser.space.randn(2)
    torch.testing.assert_close(prior.denoiser(x, torch.ones(2)), model(x, 1.0))
    assert prior.card["licence"] == "BSD-3-Clause" and prior.name == "deepinv MedianFilter"


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("is_complex", [False, True])
def test_reconstructor_gives_the_posterior_mean(is_complex):
    space = Space((1, 8, 8), torch.complex64 if is_complex else F32)
    prior = prior_on(space)
    noise = physics.GaussianNoise(0.5)
    there = (
        physics.MRI(MASK, (2, 8, 8), noise_model=noise)
        if is_complex
        else physics.Inpainting((1, 8, 8), mask=MASK[0], noise_model=noise)
    )
    model = bridge.as_reconstructor(prior, "dds", image=space, draws=64, seed=0)
    x = space.randn(2)
    y = there(bridge.to_pairs(x) if is_complex else x)
    found = model(y, there)
    # the posterior mean of N(0, 1) under noise 0.5 is A^H y / (1 + 1/4)
    expected = there.A_adjoint(y) / 1.25
    assert found.shape == expected.shape
    assert float((found - expected).pow(2).mean().sqrt()) < 0.2
    assert model.sample(y, there).n_cases == 2


# ---- scipy and sigpy ----


@pytest.mark.parametrize("kind", ["dense", "sparse", "complex", "function"])
def test_scipy_operators_here(kind):
    from scipy import sparse
    from scipy.sparse.linalg import aslinearoperator

    rng = np.random.default_rng(0)
    m = rng.standard_normal((7, 12))
    m = m + 1j * rng.standard_normal((7, 12)) if kind == "complex" else m
    given = {"sparse": sparse.csr_array(m), "function": aslinearoperator(m)}.get(kind, m)
    op = scipy_bridge.from_linop(given, (1, 3, 4))
    check_operator(op).raise_if_failed()
    x = op.domain.randn(2)
    np.testing.assert_allclose(op(x)[1].numpy(), m @ x[1].numpy().reshape(-1))
    back = scipy_bridge.to_linop(op)
    np.testing.assert_allclose(back @ np.eye(12), m)
    np.testing.assert_allclose(back.H @ np.eye(7), m.conj().T)


def test_scipy_digests_tell_matrices_apart():
    a, b = (scipy_bridge.from_linop(np.eye(3) * s, (3,)).describe() for s in (1.0, 2.0))
    assert a != b


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_ours_solved_by_scipy(dtype):
    from scipy.sparse.linalg import lsqr

    op = operators.SubsampledFourier(torch.ones(5, 6), dtype=dtype)
    linop, x = scipy_bridge.to_linop(op), op.domain.randn(1)
    y = op(x)[0].flatten()
    data = torch.cat([y.real, y.imag]).numpy() if dtype == F64 else y.numpy()
    np.testing.assert_allclose(lsqr(linop, data, atol=1e-12, btol=1e-12)[0], x.flatten().numpy(), atol=1e-8)
    if dtype == F64:
        np.testing.assert_allclose(linop @ np.eye(30), dense_matrix(op).numpy(), atol=1e-12)


def test_pylops_through_scipy():
    pylops = pytest.importorskip("pylops")
    check_operator(scipy_bridge.from_linop(pylops.FirstDerivative(16), (16,))).raise_if_failed()


def test_sigpy_both_ways():
    import sigpy.mri

    s = maps(3, 6, 5)
    linop = sigpy.mri.linop.Sense(s.numpy())
    op = sigpy_bridge.from_linop(linop)
    ours = operators.MultiCoilMRI(torch.ones(6, 5), s)
    check_operator(op).raise_if_failed()
    x = op.domain.randn(2)
    assert op.domain.shape == (1, 6, 5) and "Sense" in op.name
    torch.testing.assert_close(op(x), ours(x))
    there = sigpy_bridge.to_linop(ours)
    np.testing.assert_allclose(there(x[0, 0].numpy()), linop(x[0, 0].numpy()), atol=1e-5)
    np.testing.assert_allclose((there.H * there)(x[0, 0].numpy()), ours.normal(x)[0, 0].numpy(), atol=1e-5)
    again = sigpy_bridge.from_linop(there)
    torch.testing.assert_close(again.adjoint(op(x)), op.adjoint(op(x)))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: scipy_bridge.from_linop("matrix", (3,)), "no scipy LinearOperator"),
        (lambda: scipy_bridge.from_linop(np.eye(3), (4,)), r"shape \(3, 3\), and the spaces have sizes 3 and 4"),
        (lambda: scipy_bridge.from_linop(1j * np.eye(3), Space((3,)), Space((3,))), "is complex"),
        (lambda: scipy_bridge.to_linop(operators.Matrix(torch.ones(3, 2, 2))), "parameters for 3 cases"),
        (lambda: scipy_bridge.to_linop(3), "int is none"),
        (lambda: sigpy_bridge.from_linop(3), "needs a sigpy Linop"),
        (lambda: sigpy_bridge.to_linop(operators.SubsampledFourier(torch.ones(3, 3), dtype=F32)), "one dtype"),
    ],
)
def test_bad_linops(run, words):
    with pytest.raises(InvdiffError, match=words) as caught:
        run()
    assert "\n" not in str(caught.value)
