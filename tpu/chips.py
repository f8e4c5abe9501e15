"""The data sheets of TPU chips."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The data sheet of a chip from cloud.google.com/tpu/docs; `flops.PEAK_FLOPS` has its peak FLOP/s.

    Networks as in "How to scale your model" (2025), ch. 2. JAX shows a tpu7x chip as two devices, so its figures are
    half of the chip's.
    """

    kind: str  # ``device_kind`` of its devices
    hbm: float  # [bytes]
    hbm_bandwidth: float  # [bytes/s]
    clock: float  # peak FLOP/s over the FLOPs of the matrix units per cycle [Hz]
    ici: float  # all links to neighbors together, in one direction [bytes/s]
    dcn: float  # a chip's share of the network to other slices [bytes/s]


CHIPS = {
    "v4": Chip("TPU v4", 32e9, 1.2e12, 1.05e9, 6 * 45e9, 3.1e9),
    "v5e": Chip("TPU v5 lite", 16e9, 0.819e12, 1.5e9, 4 * 45e9, 3.1e9),
    "v5p": Chip("TPU v5p", 95e9, 2.765e12, 1.75e9, 6 * 90e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 32e9, 1.64e12, 1.75e9, 4 * 90e9, 12.5e9),
    "tpu7x": Chip("TPU7x", 96e9, 7.37e12 / 2, 2.2e9, 300e9, 6.25e9),
}
