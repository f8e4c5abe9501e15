"""Write matplotlib figures as PNG files, locally or to a bucket."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath


def write_figure(figure: Any, file: epath.Path) -> None:
    """Write a matplotlib figure as PNG to ``file``, local or in a bucket, and close it."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    plt.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png.getvalue())


def save_picture(
    path: epath.Path, draw: Callable[[np.ndarray], None], panels: int = 2, size: tuple[float, float] = (12, 4.5)
) -> epath.Path:
    """Call ``draw`` on a row of ``panels`` axes in a figure of ``size`` [inches], and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    draw(axes[0])
    write_figure(figure, path)
    return path
