"""Exceptions that carry one clear sentence: what is wrong, what was expected, what to do."""

from __future__ import annotations


class InvdiffError(ValueError):
    """Bad input. The message is one sentence fit to be shown to a user as it stands."""


class CapabilityError(InvdiffError):
    """A sampler needs structure that the problem or the prior does not have."""


class NonFiniteError(InvdiffError):
    """A draw became NaN or infinite and the policy was to stop."""


class ResumeError(InvdiffError):
    """A checkpoint belongs to another run or cannot be read."""


class StoreError(InvdiffError):
    """A posterior file cannot be read or written."""
