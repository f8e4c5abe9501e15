"""Weights in int8 for decoding: each matrix as integers and one scale per output channel, by qwix (extra ``int8``)."""

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
"""The matrices that become int8, and the axes that a product with them keeps: a scale for each index there."""


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError("int8 weights need qwix: pip install layerskip_jax[int8]") from None
    return qwix


class Int8Param(nnx.Param[Any]):
    """A matrix that is kept as a ``qwix.QArray`` and read, with ``[...]``, as the float32 array ``q * scale``."""

    def get_value(self, *, index: Any = ...) -> jax.Array:
        """Return ``(q * scale)[index]``; under jit it is computed where it is used, not stored with the model."""
        return _qwix().dequantize(self.get_raw_value())[index]


def quantized(model: Transformer) -> Transformer:
    """Return an unstacked ``model`` with int8 matrices: ``q = round(w / scale)``, ``scale = max |w_channel| / 127.5``.

    A weight takes 1 byte and a channel 4 more, where float32 takes 4 bytes a weight. Activations and norms stay as
    they are. So does the embedding, of which a token reads one row; a head tied to it becomes a matrix of its own.
    """
    qwix = _qwix()
    if not isinstance(model.blocks, nnx.List):
        model = model.unstacked()
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)  # new modules around the same arrays: the caller's model keeps its own
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
    """Return an unstacked ``model`` with weights as `DecodeConfig.weights` names them."""
    return quantized(model) if kind == "int8" else model
