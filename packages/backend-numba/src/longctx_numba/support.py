"""What this backend declares, op by op; the only place that claims support."""

from __future__ import annotations

from collections.abc import Mapping

from longctx import OpSupport

__all__ = ["SUPPORT"]

SUPPORT: Mapping[str, OpSupport] = {}
