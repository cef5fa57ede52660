"""The centred orthonormal FFT over the last two axes, its phases, and the Hartley transform.

With ``c = N // 2``, the centred transform ``X[k] = N^(-1/2) sum_n x[n] exp(-2 pi i (k - c)(n - c) / N)`` is a
bare FFT between two phase factors: ``exp(2 pi i c n / N)`` on the input and ``exp(2 pi i c (k - c) / N)`` on
the output. That holds for odd sizes too, needs no shifts, and lets the factors merge with masks and maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = (-2, -1)


def fft2(x: Tensor, norm: str = "backward") -> Tensor:
    """Return ``torch.fft.fft2`` of ``(..., y, x)``; of no rows too, which some builds of torch refuse."""
    return torch.fft.fft2(x, norm=norm) if x.numel() else x.to(x.dtype.to_complex())


def ifft2(x: Tensor, norm: str = "backward") -> Tensor:
    """Return ``torch.fft.ifft2`` of ``(..., y, x)``; of no rows too."""
    return torch.fft.ifft2(x, norm=norm) if x.numel() else x.to(x.dtype.to_complex())


def phases(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the input phase and the output phase, each ``(y, x)`` and of complex ``dtype``."""
    (in_y, out_y), (in_x, out_x) = (phases_1d(n) for n in shape)
    pair = (in_y[:, None] * in_x, out_y[:, None] * out_x)
    return pair[0].to(device=device, dtype=dtype), pair[1].to(device=device, dtype=dtype)


def phases_1d(n: int) -> tuple[Tensor, Tensor]:
    c, index = n // 2, torch.arange(n)
    if n % 2 == 0:  # exactly +1 and -1, free of rounding
        sign = (1 - 2 * (index % 2)).to(torch.complex128)
        return sign, sign * (-1) ** c
    # integers modulo n before the angle, so that large products lose no digits
    turn = torch.tensor(2 * torch.pi / n, dtype=torch.float64)
    one = torch.ones(n, dtype=torch.float64)
    return torch.polar(one, (c * index % n).double() * turn), torch.polar(
        one, (c * (index - c) % n).double() * turn
    )


def centred_fft(x: Tensor) -> Tensor:
    """Return the centred orthonormal FFT of ``(..., y, x)``."""
    return torch.fft.fftshift(fft2(torch.fft.ifftshift(x, AXES), norm="ortho"), AXES)


def centred_ifft(k: Tensor) -> Tensor:
    """Return the inverse of :func:`centred_fft`."""
    return torch.fft.fftshift(ifft2(torch.fft.ifftshift(k, AXES), norm="ortho"), AXES)


def hartley(x: Tensor) -> Tensor:
    """Return the centred Hartley transform ``Re X - Im X`` of real ``(..., y, x)``, its own inverse."""
    k = centred_fft(x)
    return k.real - k.imag


def reflect(values: Tensor) -> Tensor:
    """Return ``values[-k]`` in centred order over the last two axes."""
    flipped = values.flip(AXES)
    return flipped.roll([1 - values.shape[-2] % 2, 1 - values.shape[-1] % 2], AXES)
