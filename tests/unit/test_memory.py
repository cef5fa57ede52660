"""The heap keeps what a step frees while a run lasts, and gives it back afterwards."""

from __future__ import annotations

import pytest

from invdiff import memory


class _Recorder:
    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


def test_heap_is_kept_and_given_back_even_after_an_error(monkeypatch):
    libc = _Recorder()
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    with pytest.raises(KeyError), memory.kept_heap():
        assert (memory._TRIM_THRESHOLD, memory._KEPT) in libc.calls
        raise KeyError
    assert libc.calls[-2:] == [(memory._TRIM_THRESHOLD, memory._TRIM_USUAL), "trim"]


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.kept_heap():
        pass


def test_only_glibc_is_asked(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory._glibc() is None
