"""safer_engine: the science of safer-audit. Knows nothing of queues, databases, HTTP servers or S3."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safer_engine.api import AuditReport, audit

__all__ = ["AuditReport", "audit"]

# Without it MKL's products on some processors (seen on an AMD EPYC) depend on where in memory the operands happen to lie, and
# a training that is stopped and resumed differs in the last bits from one that is not. Read by MKL at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO")


def __getattr__(name: str) -> Any:
    """Load the interface on first use, so that light parts can be imported without the heavy ones."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safer_engine import api

    return getattr(api, name)
