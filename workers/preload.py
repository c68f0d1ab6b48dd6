"""Imported once by the server process from which children are forked, so that they need not: what most stages import.

Nothing here touches a GPU. A new worker is slower to start by some seconds, and every stage faster by as much.
"""
# ruff: noqa: F401 - importing is all that is done here

import jinja2.sandbox
import numpy
import pandas
import pyarrow.parquet
import safetensors.torch
import scipy.sparse
import scipy.stats
import torch
import transformers.modeling_layers
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.tokenization_python

import workers.child
