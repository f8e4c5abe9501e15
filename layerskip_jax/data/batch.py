"""A batch of packed sequences, on the host or on devices."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Packed sequences: B rows of T predicted tokens, as `layerskip_jax.data.pipeline.make_batches` defines them."""

    inputs_BT: jax.Array
    targets_BT: jax.Array
    segments_BT: jax.Array
    mask_BT: jax.Array
