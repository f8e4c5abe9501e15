"""Write matplotlib figures as PNG files, to this machine or to a bucket."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath


def write_figure(figure: Any, file: epath.Path) -> None:
    """Write a matplotlib figure as PNG to ``file``, also in a bucket, and close it."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    plt.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png.getvalue())


def save_picture(
    path: epath.Path, draw: Callable[[np.ndarray], None], panels: int = 2, size: tuple[float, float] = (12, 4.5)
) -> epath.Path:
    """Let ``draw`` fill ``panels`` axes side by side, of ``size`` [inches] together, and write them as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    draw(axes[0])
    write_figure(figure, path)
    return path
