"""Imported once by the server process from which children are forked. Touches no GPU and starts no thread."""

import numpy  # noqa: F401
import pyarrow  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto  # noqa: F401

import workers.child  # noqa: F401
