"""The version of the backend protocol, which is apart from every package version."""

from __future__ import annotations

__all__ = ["PROTOCOL_VERSION", "is_compatible"]

PROTOCOL_VERSION: tuple[int, int] = (1, 0)
"""(major, minor): additive changes raise minor, changed meanings raise major."""


def is_compatible(protocol: tuple[int, int]) -> bool:
    """Return whether a plugin written for ``protocol`` can be used by this core.

    Parameters
    ----------
    protocol : (int, int)
        The version that the plugin states.

    Returns
    -------
    bool
        True for the same major version and a minor version that is not newer than ours.
    """
    return protocol[0] == PROTOCOL_VERSION[0] and protocol[1] <= PROTOCOL_VERSION[1]
