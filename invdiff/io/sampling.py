"""Which k-space positions were sampled: found from the data, or given and checked against them."""

from __future__ import annotations

import numpy as np

from invdiff.errors import InvdiffError

#: Share of the positions that a mask calls sampled and that may yet be exactly zero in every coil.
MAX_EMPTY = 0.01


def find_mask(kspace: np.ndarray) -> np.ndarray:
    """Return the positions where any coil is not zero, bool ``(ky, kx)``.

    Args:
        kspace: ``(coil, ky, kx)``.

    Raises:
        InvdiffError: If there is none.
    """
    mask = (kspace != 0).any(axis=0)
    if not mask.any():
        raise InvdiffError(
            "The k-space is zero everywhere, so no position was sampled; check the file and the key."
        )
    return np.asarray(mask)


def check_mask(mask: np.ndarray, kspace: np.ndarray) -> np.ndarray:
    """Return a given mask as bool ``(ky, kx)`` after checking it against the data.

    Args:
        mask: Ones where sampled: ``(ky, kx)``, the same with leading axes of length 1, or one line ``(kx,)`` that
            holds for every ``ky`` (fastMRI), or ``(ky, 1)``.
        kspace: ``(coil, ky, kx)``.

    Raises:
        InvdiffError: On a wrong shape, values other than 0 and 1, no sampled position, or a mask that contradicts
            the data (data where it says there are none, or empty positions where it says there are data).
    """
    full = _spread(np.asarray(mask), kspace.shape[-2:])
    if not full.any():
        raise InvdiffError("The mask has no sampled position; expected ones where k-space was measured.")
    seen = (kspace != 0).any(axis=0)
    outside = int((seen & ~full).sum())
    if outside:
        raise InvdiffError(
            f"The mask contradicts the data: {outside} of {int(seen.sum())} positions with data lie where it says "
            "nothing was sampled; give the right mask, leave it out, or set those data to zero to withhold them."
        )
    empty = int((full & ~seen).sum())
    if empty > MAX_EMPTY * int(full.sum()):
        raise InvdiffError(
            f"The mask contradicts the data: {empty} of the {int(full.sum())} positions it calls sampled are zero "
            "in every coil; give the right mask or leave it out to have it found from the data."
        )
    return full


def _spread(mask: np.ndarray, plane: tuple[int, ...]) -> np.ndarray:
    """Check the values of a mask and spread it over the plane ``(ky, kx)``."""
    values = mask.real if np.iscomplexobj(mask) and not np.any(mask.imag) else mask
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InvdiffError("A sampling mask may hold only 0 (not sampled) and 1 (sampled); threshold it first.")
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.shape == plane or values.shape in ((plane[1],), (1, plane[1]), (plane[0], 1)):
        return np.broadcast_to(values.astype(bool), plane).copy()
    raise InvdiffError(
        f"The mask has shape {mask.shape} and the k-space plane (ky, kx) is {tuple(plane)}; "
        "expected that shape, or one line (kx,) that holds for every ky."
    )


def acceleration(mask: np.ndarray) -> float:
    """Return the number of positions over the number of sampled ones."""
    return float(mask.size / max(int(mask.sum()), 1))


def centre_width(mask: np.ndarray) -> tuple[int, int]:
    """Return ``(wy, wx)``: the fully sampled block around the centre of k-space with the largest area.

    Along an axis of length ``n`` a block of width ``w`` covers ``n // 2 - w // 2`` up to ``n // 2 - w // 2 + w``.
    """
    best = (0, 0)
    for wy in range(1, mask.shape[0] + 1):
        rows = _centre(mask, 0, wy).all(axis=0)
        wx = _run(np.asarray(rows))
        if wx == 0:
            break
        if wy * wx > best[0] * best[1]:
            best = (wy, wx)
    return best


def centre_square(mask: np.ndarray) -> int:
    """Return the width of the largest fully sampled square around the centre of k-space."""
    width = 0
    for w in range(1, min(mask.shape) + 1):
        if not _centre(_centre(mask, 0, w), 1, w).all():
            break
        width = w
    return width


def _centre(mask: np.ndarray, axis: int, width: int) -> np.ndarray:
    start = mask.shape[axis] // 2 - width // 2
    return mask[start : start + width] if axis == 0 else mask[:, start : start + width]


def _run(line: np.ndarray) -> int:
    """Return the longest width around the centre of a line that is true throughout."""
    width = 0
    for w in range(1, len(line) + 1):
        start = len(line) // 2 - w // 2
        if not line[start : start + w].all():
            break
        width = w
    return width
