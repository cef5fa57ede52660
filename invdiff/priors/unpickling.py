"""Pickled checkpoints read as data, without executing anything in them.

Read are plain pickles (EDM's, with the storages of torch inside), torch's archives and torch's older files, by the
machine of `invdiff.priors.pickle_machine`. Acted out are tensors and their storages, dictionaries, and numpy's
numbers and arrays (`_MAKERS`); all else stays a record. What can be large is bounded by the bytes that are there:
a tensor has at most the elements of its storage, a storage the bytes of the file.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import InvdiffError
from invdiff.priors.pickle_machine import Inert, Machine, Maker, Name, Refused, Session

__all__ = ["Array", "Inert", "Name", "Pickled", "read_pickled"]

#: Whatever a damaged file makes of parsing: stacks that run dry, values of another kind, sizes that do not fit.
#: RuntimeError includes what torch has not implemented.
_DAMAGE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(d).removeprefix("torch."): d for d in _STORAGES.values()}


@dataclass(frozen=True)
class Pickled:
    """Content of a pickled file.

    Attributes:
        value: Tensors, numbers, text, lists, tuples, dictionaries, `Name` and `Inert`.
        names: What the file names and this reader did not act out.
    """

    value: Any
    names: tuple[str, ...]


def read_pickled(path: str | Path) -> Pickled:
    """Read a pickle or a file of torch without executing anything in it.

    Args:
        path: A plain pickle, an archive of torch (a zip file), or a file of torch before version 1.6.

    Raises:
        InvdiffError: If the file is missing, damaged, too nested, larger inside than outside, or names what only
            an attack would.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise InvdiffError(f"There is no checkpoint at {path}; check the path.")
    session = Session(path.stat().st_size)
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            warnings.catch_warnings(),
        ):
            # Text with escapes that are none, in damaged files.
            warnings.simplefilter("ignore")
            if content[:4] == b"PK\x03\x04":
                value = _read_archive(path, session)
            else:
                value = _read_stream(content, session, 0)
    except Refused as error:
        raise InvdiffError(f"{path} {error}.") from None
    except MemoryError:
        raise InvdiffError(f"{path} does not fit into memory.") from None
    except _DAMAGE as error:
        reason = re.sub(r"\s+", " ", str(error))[:120]
        raise InvdiffError(
            f"{path} is damaged or truncated, or no pickle ({type(error).__name__}: {reason}); fetch it again."
        ) from None
    return Pickled(value, tuple(sorted(session.names)))


def _read_stream(stream: Any, session: Session, nested: int) -> Any:
    """Value of a plain pickle, or of the series of pickles that torch wrote before version 1.6."""
    first = Machine(stream, session, _MAKERS, nested).run()
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    version = Machine(stream, session, _MAKERS, nested).run()
    system = Machine(stream, session, _MAKERS, nested).run()
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise Refused("is of a version of torch's format that is not known")
    if system.get("little_endian") is not True:
        raise Refused("was written on a big-endian machine, which is not read")
    storages: dict[Any, Tensor] = {}

    def storage(given: Any) -> Tensor:
        dtype, key, count = _storage_id(given)
        if len(given) > 5 and given[5] is not None:
            raise Refused("has storages that are views of others, which is not read")
        if key not in storages:
            session.spend(count * dtype.itemsize)
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    value = Machine(stream, session, _MAKERS, nested, storage).run()
    keys = Machine(stream, session, _MAKERS, nested).run()
    named = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
    if not named or set(keys) != set(storages):
        raise Refused("lists other storages than its tensors use; it is damaged")
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        target = storages[key]
        if count != len(target):
            raise Refused("has a storage of another length than its tensors need; it is damaged")
        target.copy_(_tensor(stream.read(count * target.itemsize), target.dtype, count))
    return value


def _read_archive(path: Path, session: Session) -> Any:
    """Value of torch's zip file: ``<top>/data.pkl`` and ``<top>/data/<key>``, stored without compression."""
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        tops = [n.removesuffix("data.pkl") for n in infos if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(tops) != 1 or any(n.endswith("/constants.pkl") for n in infos):
            raise Refused("is a zip file, but not one of weights that torch has saved")
        top = tops[0]
        if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos.values()):
            raise Refused("is compressed, and torch's files are not; it is not unpacked")
        if sum(i.file_size for i in infos.values()) > path.stat().st_size:
            raise Refused("unpacks to more than its size; it is not unpacked")
        if f"{top}byteorder" in infos and archive.read(f"{top}byteorder") != b"little":
            raise Refused("was written on a big-endian machine, which is not read")
        storages: dict[Any, Tensor] = {}

        def storage(given: Any) -> Tensor:
            dtype, key, count = _storage_id(given)
            if key not in storages:
                name = f"{top}data/{key}"
                if name not in infos:
                    raise Refused(f"lacks the data of storage {str(key)[:20]}; it is damaged")
                storages[key] = _tensor(archive.read(name), dtype, count)
            if storages[key].dtype != dtype:
                storages[key] = storages[key].view(dtype)
            return storages[key]

        return Machine(io.BytesIO(archive.read(f"{top}data.pkl")), session, _MAKERS, 0, storage).run()


def _storage_id(given: Any) -> tuple[torch.dtype, Any, int]:
    """Precision, key and length of ``("storage", type, key, location, length, ...)``."""
    if not isinstance(given, tuple) or len(given) not in (5, 6) or given[0] != "storage":
        raise Refused("refers to something outside of it that is no storage of torch")
    kind, key, count = given[1], given[2], given[4]
    if not isinstance(kind, Name) or kind.module not in ("torch", "torch.storage") or kind.name not in _STORAGES:
        raise Refused(f"has a storage of the kind {str(kind)[:60]}, which is not read")
    if not isinstance(key, str | int) or not isinstance(count, int) or count < 0:
        raise Refused("has a storage without name or length; it is damaged")
    return _STORAGES[kind.name], key, count


def _tensor(data: bytes, dtype: torch.dtype, count: int) -> Tensor:
    """Bytes as a flat tensor of its own."""
    if len(data) != count * dtype.itemsize:
        raise Refused(f"has {len(data)} bytes where {count * dtype.itemsize} are announced; it is truncated")
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


@dataclass(eq=False)
class Array(Inert):
    """An array of numpy; ``value`` is there once the pickle has filled it."""

    value: np.ndarray | None = None

    def build(self, machine: Machine, state: Any) -> None:
        """Take ``(version, shape, dtype, Fortran order, bytes)``."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("has an array of numpy without its numbers; it is damaged")
        _, shape, dtype, fortran, data = state
        self.value = _array(machine, data, dtype, shape, "F" if fortran is True else "C")


class _DType(Inert):
    """A dtype of numpy, of plain numbers or not."""

    numpy: np.dtype | None = None

    def build(self, machine: Machine, state: Any) -> None:
        """Take the order of bytes."""
        sign = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if self.numpy is not None and isinstance(sign, str) and sign in ("<", ">", "|", "="):
            self.numpy = np.dtype(sign + self.numpy.str[1:])


def _array(m: Machine, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray | None:
    """Numbers from bytes; None where they are no plain numbers (the file then keeps its record)."""
    if not isinstance(dtype, _DType) or dtype.numpy is None or not isinstance(data, bytes | bytearray):
        return None
    if not _sizes(shape) or math.prod(shape) * dtype.numpy.itemsize != len(data):
        raise Refused("has an array of numpy of another size than its shape; it is damaged")
    m.session.spend(len(data))
    flat = np.frombuffer(bytes(data), dtype.numpy)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy()


def _sizes(given: Any) -> bool:
    """Whether something is a short tuple of whole numbers that are not negative."""
    return isinstance(given, tuple) and len(given) <= 32 and all(isinstance(n, int) and n >= 0 for n in given)


def _made_dtype(m: Machine, args: tuple[Any, ...]) -> Any:
    made = _DType(Name("numpy", "dtype"), args)
    if args and isinstance(args[0], str) and re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", args[0]):
        made.numpy = np.dtype(args[0])
    return made


def _made_scalar(m: Machine, args: tuple[Any, ...]) -> Any:
    if len(args) != 2 or (value := _array(m, args[1], args[0], (1,), "C")) is None:
        return Inert(Name("numpy", "scalar"), args)
    return value[0].item()


def _made_from_buffer(m: Machine, args: tuple[Any, ...]) -> Any:
    made = Array(Name("numpy", "ndarray"))
    if len(args) == 4:
        made.value = _array(m, *args)
    return made


def _made_tensor(m: Machine, args: tuple[Any, ...]) -> Any:
    """A view of a storage, with every element inside of it."""
    storage, offset, size, stride = args[:4]
    flat = isinstance(storage, Tensor) and storage.ndim == 1
    if not flat or not isinstance(offset, int) or offset < 0 or not _sizes(size) or not _sizes(stride):
        raise Refused("has a tensor without storage or shape; it is damaged")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) and (last >= len(storage) or math.prod(size) > len(storage)):
        raise Refused("has a tensor that is larger than its storage; it is damaged")
    return storage.as_strided(size, stride, offset) if math.prod(size) else storage.new_empty(size)


def _made_typed_tensor(m: Machine, args: tuple[Any, ...]) -> Any:
    """The same, of bytes, with the precision last."""
    kind = args[6] if len(args) > 6 else None
    if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in _DTYPES:
        raise Refused(f"has a tensor of the precision {str(kind)[:40]}, which is not read")
    return _made_tensor(m, (args[0].view(_DTYPES[kind.name]), *args[1:4]))


def _made_parameter(m: Machine, args: tuple[Any, ...]) -> Any:
    return args[0]


def _made_typed(m: Machine, args: tuple[Any, ...]) -> Any:
    """A tensor with attributes: function, class, arguments, attributes; the attributes are dropped."""
    if len(args) != 4 or not isinstance(args[0], Name):
        raise Refused("is damaged")
    return m.call(args[0], args[2])


def _made_storage(m: Machine, args: tuple[Any, ...]) -> Any:
    """A file of torch within the file."""
    if len(args) != 1 or not isinstance(args[0], bytes | bytearray):
        raise Refused("has a storage without bytes; it is damaged")
    m.session.spend(len(args[0]))
    return _read_stream(io.BytesIO(args[0]), m.session, m.nested + 1)


def _made_dict(m: Machine, args: tuple[Any, ...]) -> Any:
    """A dictionary, from pairs, or from another one."""
    new: dict[Any, Any] = {}
    if args and isinstance(args[0], list):
        m.session.spend(16 * len(args[0]))
        m.put(new, [part for pair in args[0] for part in _pair(pair)])
    elif args and isinstance(args[0], dict):
        m.session.spend(16 * len(args[0]))
        new |= args[0]
    return new


def _pair(given: Any) -> Any:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise Refused("is damaged")
    return given


def _made_sequence(m: Machine, args: tuple[Any, ...]) -> Any:
    return args[0] if args and isinstance(args[0], list | tuple) else []


def _made_bytes(m: Machine, args: tuple[Any, ...]) -> Any:
    """Bytes that an old pickle writes as text of one character each."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
        raise Refused("is damaged")
    m.session.spend(len(args[0]))
    return args[0].encode("latin1")


def _made_by_base(m: Machine, args: tuple[Any, ...]) -> Any:
    """What pickles before protocol 2 say instead of a call of the class: class, base, and the base's value."""
    if len(args) != 3 or not isinstance(args[0], Name):
        raise Refused("is damaged")
    given = (args[2],) if isinstance(args[2], dict | list | tuple) else ()
    return m.call(args[0], given)


def _made_persistent(m: Machine, args: tuple[Any, ...]) -> Any:
    """An object whose class travels as source text: name and state are kept, the text is dropped unread."""
    meta = args[0] if args else None
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise Refused("has an object without the name of its class; it is damaged")
    name = Name("torch_utils.persistence", meta["class_name"][:100])
    m.session.names.add(str(name))
    return Inert(name, (), meta.get("state"))


#: All that is acted out; the names are compared whole.
_MAKERS: dict[Name, Maker] = {
    Name("torch._utils", "_rebuild_tensor"): _made_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _made_tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _made_typed_tensor,
    Name("torch._utils", "_rebuild_parameter"): _made_parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _made_parameter,
    Name("torch._tensor", "_rebuild_from_type_v2"): _made_typed,
    Name("torch.storage", "_load_from_bytes"): _made_storage,
    Name("torch", "Size"): _made_sequence,
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _made_persistent,
    Name("_codecs", "encode"): _made_bytes,
    **dict.fromkeys((Name(m, "_reconstructor") for m in ("copyreg", "copy_reg")), _made_by_base),
    **dict.fromkeys((Name("dnnlib.util", "EasyDict"), Name("dnnlib", "EasyDict")), _made_dict),
    **dict.fromkeys((Name("collections", "OrderedDict"), Name("builtins", "dict")), _made_dict),
    Name("collections", "defaultdict"): lambda m, args: {},
    **dict.fromkeys((Name("builtins", n) for n in ("list", "tuple", "set", "frozenset")), _made_sequence),
    **dict.fromkeys((Name("__builtin__", n) for n in ("list", "tuple", "set", "frozenset")), _made_sequence),
    Name("numpy", "dtype"): _made_dtype,
    **{
        Name(f"numpy.{core}.{module}", name): maker
        for core in ("core", "_core")
        for module, name, maker in (
            ("multiarray", "_reconstruct", lambda m, args: Array(Name("numpy", "ndarray"))),
            ("multiarray", "scalar", _made_scalar),
            ("numeric", "_frombuffer", _made_from_buffer),
        )
    },
}
