"""int8 weights for decoding: integer matrices with one scale per output channel, by qwix (extra ``int8``)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerskip_jax.errors import UserError
from layerskip_jax.model import Transformer

OUTPUT_AXES = {
    "query_key_value_DM": (1,),
    "output_NHD": (2,),
    "gate_up_DM": (1,),
    "down_FD": (1,),
    "head_DV": (1,),
}
"""The matrices to quantize, and their output axes: each index there has its own scale."""


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError("int8 weights need qwix: pip install 'layerskip-jax[int8]'") from None
    return qwix


class Int8Param(nnx.Param[Any]):
    """A matrix stored as a ``qwix.QArray``; indexing with ``[...]`` returns the float32 array ``q * scale``."""

    def get_value(self, *, index: Any = ...) -> jax.Array:
        """Return ``(q * scale)[index]``. Under jit, a GPU or TPU computes it at each use; XLA:CPU does it once a call,
        before the decode loop, and keeps the result."""
        return _qwix().dequantize(self.get_raw_value())[index]


def quantized(model: Transformer) -> Transformer:
    """Return an unstacked copy of ``model`` with int8 matrices: ``q = round(w / scale)``, ``scale = max |w| / 127.5``.

    The maximum is over an output channel. A weight takes 1 byte and a channel 4 bytes more. Activations, norms and the
    embedding are not quantized; a token reads only one row of the embedding. A tied head becomes a separate int8
    matrix.
    """
    qwix = _qwix()
    graph, state = nnx.split(model.unstacked())
    model = nnx.merge(graph, state)  # new modules that share the arrays, so the caller's model does not change
    if model.config.tied_embedding:
        model.head_DV = nnx.Param(model.embedding_VD[...].T, axes=("embed", "vocab"))
        model.config = dataclasses.replace(model.config, tied_embedding=False)
    for module in [*model.blocks, model]:
        for name, axes in OUTPUT_AXES.items():
            if hasattr(module, name):
                param = getattr(module, name)
                array = qwix.quantize(param[...], jnp.int8, channelwise_axes=axes, scale_dtype=jnp.float32)
                setattr(module, name, Int8Param(array, **param.get_metadata()))
    return model


def with_weights(model: Transformer, kind: str) -> Transformer:
    """Return ``model`` itself, or its `quantized` copy if ``kind`` (`DecodeConfig.weights`) is int8."""
    return quantized(model) if kind == "int8" else model
