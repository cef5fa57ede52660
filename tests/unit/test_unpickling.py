"""Pickles read as data: what honest files hold comes out whole, and what hostile ones ask for does not happen."""

import collections
import io
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from invdiff import InvdiffError
from invdiff.priors import pickle_machine
from invdiff.priors.unpickling import Array, Inert, Name, read_pickled


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def content():
    base = randn(6, 8)
    numbers = {
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "complex": torch.complex(base, base),
        "long": torch.arange(5),
        "bool": base > 0,
        "empty": base[:0],
        "scalar": torch.tensor(3.5),
        "view": base[1:5:2, ::3].T,
        "same": base,
        "parameter": torch.nn.Parameter(base),
        "attributes": torch.nn.Parameter(base + 1),
        "tagged": base + 2,
    }
    numbers["attributes"].decay = numbers["tagged"].decay = False
    return {
        "model": collections.OrderedDict(numbers),
        "numpy": [np.float32(2.5), np.int64(-3), np.bool_(True), np.asfortranarray(np.arange(6.0).reshape(2, 3))],
        "plain": {"step": 7, "name": "a", "pair": (1, None, True), 3: b"x", "set": {1}},
    }


def compare(found, expected):
    assert list(found["model"]) == list(expected["model"])
    for key, value in expected["model"].items():
        assert found["model"][key].dtype == value.dtype, key
        torch.testing.assert_close(found["model"][key], value.detach(), rtol=0, atol=0)
    numbers, array = found["numpy"][:3], found["numpy"][3]
    assert numbers == [2.5, -3, True]
    assert [type(n) for n in numbers] == [float, int, bool]
    assert isinstance(array, Array)
    np.testing.assert_array_equal(array.value, expected["numpy"][3])
    assert found["plain"] == expected["plain"] | {"set": [1]}


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(tmp_path, zipped):
    path = tmp_path / "c.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=zipped)
    found = read_pickled(path)
    compare(found.value, content())
    assert found.names == ()
    # Views share their storage as they did.
    model = found.value["model"]
    assert model["view"].data_ptr() == model["same"].data_ptr() + 8 * 4


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_pickles(tmp_path, protocol):
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps(content(), protocol=protocol))
    compare(read_pickled(path).value, content())


class Callback:
    def __init__(self):
        self.best = torch.ones(2)


class Listed(list):
    pass


def test_objects_stay_records(tmp_path):
    with torch.random.fork_rng():
        layer = torch.nn.Linear(3, 2)
    path = tmp_path / "c.ckpt"
    torch.save({"layer": layer, Callback: {"object": Callback()}, "listed": Listed([1, 2])}, path)
    found = read_pickled(path)
    here = Name(Callback.__module__, "Callback")
    record = found.value["layer"]
    assert isinstance(record, Inert)
    assert record.name == Name("torch.nn.modules.linear", "Linear")
    torch.testing.assert_close(record.state["_parameters"]["weight"], layer.weight.detach())
    made = found.value[here]["object"]
    assert made.name == here
    torch.testing.assert_close(made.state["best"], torch.ones(2))
    assert found.value["listed"].items == [1, 2]
    assert str(here) in found.names
    assert "torch.nn.modules.linear.Linear" in found.names


# Every payload would leave a file behind if any of it were run; `run` proves that it would.
class Runs:
    def __init__(self, function, *args):
        self.called = (function, args)

    def __reduce__(self):
        return self.called


def flag_of(tmp_path):
    return tmp_path / "flag"


def writes(tmp_path):
    return f"open({str(flag_of(tmp_path))!r}, 'w').close()"


def hostile(tmp_path):
    command = f"touch {flag_of(tmp_path)}"
    code = writes(tmp_path)
    inner = pickle.dumps(Runs(os.system, command))
    return {
        "system": Runs(os.system, command),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "loads": Runs(pickle.loads, inner),
        "import": Runs(__import__, "subprocess"),
        "chain": Runs(eval, Runs(str, Runs(eval, repr(code)))),
        "argument": Runs(dict, [("a", Runs(os.system, command))]),
        "state": {"state_dict": Runs(eval, code), "epoch": 3},
    }


def run(data):
    return pickle.loads(data)


@pytest.mark.parametrize("name", ["system", "eval", "exec", "loads", "chain", "argument", "state"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_are_not_made(tmp_path, name, protocol):
    data = pickle.dumps(hostile(tmp_path)[name], protocol=protocol)
    path = tmp_path / "c.pkl"
    path.write_bytes(data)
    with pytest.raises(InvdiffError, match="nothing of it was run"):
        read_pickled(path)
    assert not flag_of(tmp_path).exists()
    run(data)
    assert flag_of(tmp_path).exists()


@pytest.mark.parametrize("name", ["system", "eval", "exec", "loads", "import", "chain", "argument", "state"])
def test_the_list_of_hostile_names_is_no_part_of_the_safety(tmp_path, name, monkeypatch):
    monkeypatch.setattr(pickle_machine, "_HOSTILE_MODULES", "")
    monkeypatch.setattr(pickle_machine, "_HOSTILE_BUILTINS", "")
    for protocol in (0, 2, 4):
        path = tmp_path / "c.pkl"
        path.write_bytes(pickle.dumps(hostile(tmp_path)[name], protocol=protocol))
        found = read_pickled(path)
        assert found.names
        assert not flag_of(tmp_path).exists()


def text(value):
    data = value.encode()
    return b"\x8c" + struct.pack("<B", len(data)) + data


def named(module, name):
    """A name by STACK_GLOBAL, dots and all."""
    return text(module) + text(name) + b"\x93"


def raw(tmp_path, body):
    path = tmp_path / "c.pkl"
    path.write_bytes(b"\x80\x04" + body + b".")
    return path


@pytest.fixture
def unlisted(monkeypatch):
    """Only the machine itself protects."""
    monkeypatch.setattr(pickle_machine, "_HOSTILE_MODULES", "")
    monkeypatch.setattr(pickle_machine, "_HOSTILE_BUILTINS", "")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("collections", "OrderedDict.__init__.__builtins__"),
        ("collections", "abc.sys.modules"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "hub.os.system"),
        ("invdiff.priors.unpickling", "zipfile.os.system"),
        ("numpy.core.multiarray", "_reconstruct "),
        ("torch.storage", "_load_from_bytes.__call__"),
    ],
)
def test_dotted_names_reach_nothing(tmp_path, unlisted, module, name):
    # (module.name)(text), its state set, an entry set, and the result called again.
    command = text(writes(tmp_path))
    called = named(module, name) + command + b"\x85R"
    body = called + b"}" + text("__class__") + named("os", "system") + b"sb" + text("k") + command + b"s"
    body += command + b"\x85R"
    found = read_pickled(raw(tmp_path, body)).value
    assert isinstance(found, Inert)
    assert not flag_of(tmp_path).exists()


def test_getattr_reaches_nothing(tmp_path, unlisted):
    # getattr(getattr(OrderedDict, "__init__"), "__globals__")["sys"] and so on, written by hand.
    get = named("builtins", "getattr")
    first = get + named("collections", "OrderedDict") + text("__init__") + b"\x86R"
    second = get + first + text("__globals__") + b"\x86R"
    body = second + text("touch") + b"\x85R"
    found = read_pickled(raw(tmp_path, body)).value
    assert isinstance(found, Inert)
    assert found.name == Name("builtins", "getattr")
    # The same with real objects as targets: state goes nowhere, entries into a dictionary of ours alone.
    for real in (b"}", b"]", b")", text("x"), b"K\x01", named("collections", "OrderedDict") + b")R"):
        body = real + b"}" + text("__class__") + named("os", "system") + b"sb"
        value = read_pickled(raw(tmp_path, body)).value
        assert type(value) in (dict, list, tuple, str, int)
        assert not value or value in ("x", 1)


def test_a_call_hidden_in_a_persistent_id(tmp_path, unlisted):
    call = named("posix", "system") + text(f"touch {flag_of(tmp_path)}") + b"\x85R"
    for body in (call + b"Q", b"(" + text("storage") + call + text("0") + text("cpu") + b"K\x01tQ"):
        with pytest.raises(InvdiffError, match="outside of it"):
            read_pickled(raw(tmp_path, body))
        path = tmp_path / "c.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("top/data.pkl", b"\x80\x04" + body + b".")
        with pytest.raises(InvdiffError, match=r"no storage of torch|storage of the kind"):
            read_pickled(path)
    assert not flag_of(tmp_path).exists()


def test_a_call_hidden_in_a_nested_file(tmp_path, unlisted):
    inner = pickle.dumps(Runs(os.system, f"touch {flag_of(tmp_path)}"), protocol=2)
    load = named("torch.storage", "_load_from_bytes")
    body = load + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R"
    found = read_pickled(raw(tmp_path, body)).value
    assert isinstance(found, Inert)
    assert not flag_of(tmp_path).exists()
    for _ in range(4):
        body = load + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R"
        inner = b"\x80\x04" + body + b"."
    with pytest.raises(InvdiffError, match="files inside files"):
        read_pickled(raw(tmp_path, body))


def persistent(tmp_path, monkeypatch):
    """A pickle of an object whose class travels as source, as EDM writes it."""
    import sys
    import types

    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        space = {}
        exec(meta["module_src"], space)
        return space

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    meta = {"type": "class", "version": 6, "module_src": writes(tmp_path), "class_name": "Net"}
    meta["state"] = {"_parameters": {"weight": torch.ones(2)}, "size": 3}
    return pickle.dumps({"ema": Runs(_reconstruct_persistent_obj, meta)})


def test_source_that_travels_with_a_class_is_not_run(tmp_path, monkeypatch):
    data = persistent(tmp_path, monkeypatch)
    path = tmp_path / "c.pkl"
    path.write_bytes(data)
    found = read_pickled(path).value["ema"]
    assert found.name == Name("torch_utils.persistence", "Net")
    torch.testing.assert_close(found.state["_parameters"]["weight"], torch.ones(2))
    assert not flag_of(tmp_path).exists()
    run(data)
    assert flag_of(tmp_path).exists()


def test_nesting_and_sharing_cost_nothing(tmp_path, monkeypatch):
    # Ten to the fiftieth elements by sharing, and two hundred thousand levels of depth.
    laughs = b"]\x940" + b"".join(b"](" + b"h%c" % i * 10 + b"e\x940" for i in range(50)) + b"h\x32"
    assert len(read_pickled(raw(tmp_path, laughs)).value) == 10
    for body in (b")" + b"\x85" * 200_000, b"]" * 200_000 + b"a" * 199_999):
        assert len(read_pickled(raw(tmp_path, body)).value) == 1
    # Hashing a nested tuple would run out of stack, not only of patience.
    with pytest.raises(InvdiffError, match="keys are not names"):
        read_pickled(raw(tmp_path, b"})" + b"\x85" * 200_000 + b"Ns"))
    monkeypatch.setattr(pickle_machine, "MOST_STEPS", 1000)
    with pytest.raises(InvdiffError, match="has more than"):
        read_pickled(raw(tmp_path, b"N0" * 500 + b"N"))


def refused(path, match):
    with pytest.raises(InvdiffError, match=match) as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)


def rebuilt(storage_length, size, stride, offset=0):
    """A tensor of one storage, in torch's archive."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    body = named("torch._utils", "_rebuild_tensor_v2")
    body += b"((" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    body += number(storage_length) + b"tQ" + number(offset) + numbers(size) + numbers(stride) + b"\x89N" + b"tR"
    return b"\x80\x04" + body + b"."


def archive(tmp_path, program, data=b"", compression=zipfile.ZIP_STORED):
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("top/data.pkl", program)
        made.writestr("top/data/0", data)
    return path


def test_sizes_are_those_of_the_file(tmp_path):
    four = struct.pack("<4f", 1, 2, 3, 4)
    good = read_pickled(archive(tmp_path, rebuilt(4, (2, 2), (2, 1)), four)).value
    torch.testing.assert_close(good, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    refused(archive(tmp_path, rebuilt(4, (1 << 40,), (0,)), four), "larger than its storage")
    refused(archive(tmp_path, rebuilt(4, (2, 2), (3, 1)), four), "larger than its storage")
    refused(archive(tmp_path, rebuilt(4, (4,), (1,), offset=1), four), "larger than its storage")
    refused(archive(tmp_path, rebuilt(4, (4,), (1,), offset=-1), four), "without storage or shape")
    refused(archive(tmp_path, rebuilt(1 << 50, (4,), (1,)), four), "truncated")
    refused(archive(tmp_path, rebuilt(4, (4,), (1,)), bytes(1 << 20), zipfile.ZIP_DEFLATED), "compressed")
    refused(raw(tmp_path, b"\x8e" + struct.pack("<Q", 1 << 60)), "damaged")
    # The same bytes a thousand times over.
    block = bytes(1 << 20)
    scalar = named("numpy.core.multiarray", "_reconstruct") + b")R(K\x01\x8a\x04" + struct.pack("<i", 1 << 20)
    scalar += b"\x85" + named("numpy", "dtype") + text("u1") + b"\x85R\x89h\x00tb0"
    bomb = b"B" + struct.pack("<I", len(block)) + block + b"\x94" + scalar * 1000
    refused(raw(tmp_path, bomb), "made to fill the memory")


def test_damage_is_one_sentence(tmp_path):
    path = tmp_path / "c.pth"
    refused(path, "no checkpoint at")
    for zipped in (True, False):
        torch.save(content(), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for part in (len(whole) // 3, len(whole) - 40):
            path.write_bytes(whole[:part])
            refused(path, "damaged|truncated")
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer, _use_new_zipfile_serialization=False)
    swapped, count = re.subn(
        rb"(little_endianq.)\x88", lambda m: m[1] + b"\x89", buffer.getvalue(), flags=re.DOTALL
    )
    assert count == 1
    path.write_bytes(swapped)
    refused(path, "big-endian")
    path.write_text("<html>not found</html>")
    refused(path, "no pickle")
    refused(raw(tmp_path, b"\x82\x01"), "EXT1")
    refused(raw(tmp_path, b"\x8b" + struct.pack("<i", 500) + b"\x7f" * 500), "more digits")
    refused(raw(tmp_path, b"\x8c\x03\xed\xb2\x80"), "damaged")
    for body in (b"", b"a", b"t", b"0", b"h\x05", b"R", b"\x93", b"(K\x01d", b"K\x01K\x02a", b"K\x01K\x02K\x03s"):
        refused(raw(tmp_path, body), "damaged|truncated")
