"""Write matplotlib figures as PNG files, locally or to a bucket."""

import io
from collections.abc import Callable

import numpy as np
from etils import epath

from layerskip_jax.locations import write_file


def save_picture(
    path: epath.Path, draw: Callable[[np.ndarray], None], panels: int = 2, size: tuple[float, float] = (12, 4.5)
) -> epath.Path:
    """Call ``draw`` on a row of ``panels`` axes in a figure of ``size`` [inches], and write it as PNG to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    draw(axes[0])
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    plt.close(figure)
    write_file(path, png.getvalue())
    return path
