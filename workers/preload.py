"""Imported once by the server process from which children are forked, so that they need not: what most stages import.

Nothing here touches a GPU. A new worker is slower to start by some seconds, and every stage faster by as much. A server whose
worker was killed meanwhile ends between two imports: nobody will ask it for a child.

It ignores SIGTERM, which batch systems and systemd send to every process of a worker: without the server the worker would take
its child for dead, and the child its worker, in the midst of the checkpoint. It ends with its worker, however that ends.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module

_MODULES = (
    "jinja2.sandbox",
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "safetensors",
    "scipy.sparse",
    "scipy.stats",
    "torch",
    "safetensors.torch",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_python",
    "workers.child",
)

signal.signal(signal.SIGTERM, signal.SIG_IGN)
_worker = os.getppid()
for _name in _MODULES:
    if os.getppid() != _worker:
        os._exit(1)
    import_module(_name)
