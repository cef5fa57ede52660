"""Images of DICOM files, by pydicom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff.training.array_files import MAX_VALUES

__all__ = ["is_dicom", "read_dicom"]

_DEFLATED = "1.2.840.10008.1.2.1.99"


def is_dicom(path: Path) -> bool:
    """Whether a file has a suffix of DICOM, or none and its mark."""
    if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return path.is_file()
    # Scanners write names like IM000001, or unique identifiers full of dots.
    if not path.is_file() or not (not path.suffix or path.suffix[1:].isdigit()):
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(paths: list[Path]) -> Iterator[tuple[NDArray[np.float32], str]]:
    """Yield every frame of files, series by series and in the order of their numbers, with words that name it.

    Values are ``slope * stored + intercept``, where the file has them; MONOCHROME1, in which the largest value is
    black, is inverted first: ``2^bits - 1 - stored``.

    Args:
        paths: Files of one or more series.

    Returns:
        float32 ``(ny, nx)``.

    Raises:
        ValueError: a file is unreadable, too large, in colour, or compressed in a way that is not read.
    """
    try:
        import pydicom
    except ImportError:
        raise ValueError("Reading DICOM needs the pydicom package: pip install 'invdiff[dicom]'.") from None
    order = []
    for path in paths:
        try:
            syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
            if syntax == _DEFLATED:
                # It would be inflated, to whatever size, before anything can be looked at.
                raise ValueError("its data set is deflated; convert it to an uncompressed transfer syntax")
            header = pydicom.dcmread(path, stop_before_pixels=True)
            _check(header)
            key = (str(header.get("SeriesInstanceUID", "")), int(header.get("InstanceNumber") or 0), path.name)
        except Exception as error:  # what pydicom makes of a damaged file has no common class
            raise ValueError(f"{path} is not a DICOM file that can be used: {_line(error)}.") from None
        order.append((key, path))
    for _, path in sorted(order):
        data = None
        try:
            data = pydicom.dcmread(path)
            frames = data.pixel_array
        except Exception as error:
            name = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
            raise ValueError(
                f"{path} has pixels that cannot be read (transfer syntax {getattr(name, 'name', name)}: "
                f"{_line(error)}); convert it to an uncompressed transfer syntax, e.g. by dcmdjpeg or gdcmconv."
            ) from None
        frames = frames.reshape(-1, *frames.shape[-2:])
        for n, frame in enumerate(frames):
            slope, intercept = _rescaling(data, n)
            yield np.float32(slope) * _upright(frame, data) + np.float32(intercept), f"{path}, frame {n}"


def _check(header: Any) -> None:
    """Refuse what is no grey image, or larger than can be held, before its pixels are read."""
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    frames = int(header.get("NumberOfFrames") or 1)
    shown = header.get("PhotometricInterpretation", "none")
    if not rows or not columns:
        raise ValueError("it holds no image")
    if int(header.get("SamplesPerPixel") or 1) != 1 or shown not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its photometric interpretation is {shown}; grey images are needed")
    if "ModalityLUTSequence" in header:
        raise ValueError("its values follow a look-up table instead of slope and intercept")
    if frames < 1 or rows * columns * frames > MAX_VALUES:
        raise ValueError(f"it declares {rows} x {columns} pixels in {frames} frames")


def _upright(frame: NDArray[Any], data: Any) -> NDArray[np.float32]:
    """Stored values that grow with brightness."""
    stored = frame.astype(np.float32)
    if data.PhotometricInterpretation == "MONOCHROME1":
        highest = -1 if data.get("PixelRepresentation", 0) else 2 ** int(data.BitsStored) - 1
        stored = np.float32(highest) - stored
    return stored


def _rescaling(data: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept of a frame: of the file, of the frame's own group, or of the shared one."""
    places = [data]
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = data.get(sequence) or []
        if index < len(groups):
            places += groups[index].get("PixelValueTransformationSequence") or []
    for place in places:
        if "RescaleSlope" in place:
            return float(place.RescaleSlope), float(place.get("RescaleIntercept") or 0)
    return 1.0, 0.0


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
