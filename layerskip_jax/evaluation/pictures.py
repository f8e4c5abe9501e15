"""Pictures with matplotlib: PNG files, and HTML that follows the light or dark mode of its reader."""

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from etils import epath

from layerskip_jax.locations import write_file

Theme = Literal["light", "dark"]

PAGE: dict[Theme, dict[str, str]] = {
    "light": {"background": "#ffffff", "panel": "#f4f5f7", "text": "#1c1f24", "muted": "#59616d", "accent": "#1f5fa8"},
    "dark": {"background": "#14171c", "panel": "#20242b", "text": "#e6e8eb", "muted": "#a3abb6", "accent": "#7db4f5"},
}
"""Colors of pages and pictures. Every text color has a contrast of 4.5 or more on both backgrounds (WCAG AA)."""

LINES: dict[Theme, str] = {
    "light": "#1f5fa8 #b84a00 #2b7a33 #b3261e #7b4fb5 #7a5230 #b0307f #6b6d00 #007a87 #59616d",
    "dark": "#7db4f5 #ff9d57 #7fd18b #ff8a80 #c3a3f2 #d3a987 #f291cb #cfd15a #63d3e0 #a3abb6",
}
"""Colors of lines: C0, C1 and so on. C1 marks the draft exit, and C9, which is gray, a plain model."""

PLAIN = {"linestyle": "--", "color": "C9"}
"""The style of a plain model's lines."""

DEPTHS: dict[Theme, tuple[float, float]] = {"light": (0.58, 0.0), "dark": (0.42, 1.0)}
"""The part of viridis that colors exits, from the first to the last. The last exit has the most contrast."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with a row of axes; ``draw`` paints them in the colors of the current theme."""

    draw: Callable[[np.ndarray], None]
    alt: str = ""
    """Describes the picture for readers who do not see it."""
    panels: int = 2
    size: tuple[float, float] = (11, 4)  # [inches]

    @cached_property
    def light(self) -> bytes:
        """The picture as PNG in light colors."""
        return self._png("light")

    def _png(self, theme: Theme) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_style(theme)):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots(1, self.panels, squeeze=False)[0])
            png = io.BytesIO()
            figure.savefig(png, dpi=130, format="png")
        return png.getvalue()

    def save(self, path: epath.Path) -> epath.Path:
        """Write the light picture as PNG, locally or to a bucket."""
        write_file(path, self.light)
        return path

    def html(self) -> str:
        """Return the light and the dark picture as HTML that needs no other file."""
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(self._png("dark"))}">'
        return f"<picture>{source}{image_html(self.light, self.alt)}</picture>"


def image_html(png: bytes, alt: str) -> str:
    """Return a picture as HTML that needs no other file."""
    return f'<img alt="{html.escape(alt)}" src="{_data(png)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _style(theme: Theme) -> Any:
    import matplotlib
    from cycler import cycler
    from matplotlib.colors import ListedColormap

    page = PAGE[theme]
    depths = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(*DEPTHS[theme], 256)), f"depth-{theme}")
    if depths.name not in matplotlib.colormaps:  # rcParams take only a name
        matplotlib.colormaps.register(depths)
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(ink, page["text"]) | {
        "axes.edgecolor": page["muted"],
        "axes.facecolor": page["background"],
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=LINES[theme].split()),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "figure.facecolor": page["background"],
        "font.size": 10.5,
        "grid.alpha": 0.25,
        "grid.color": page["muted"],
        "image.cmap": depths.name,
        "legend.edgecolor": page["background"],
        "legend.facecolor": page["background"],
        "lines.markersize": 4.5,
        "savefig.facecolor": page["background"],
    }


def exit_color(exit_layer: int, layers: int, scale: str = "") -> tuple[float, float, float, float]:
    """Return the color of an exit 1..L on a sequential scale, by default that of the current theme."""
    import matplotlib

    return matplotlib.colormaps[scale or matplotlib.rcParams["image.cmap"]]((exit_layer - 1) / max(layers - 1, 1))


def ticks(layers: int) -> list[int]:
    """Return about a dozen of the blocks or exits 1..L, with the first and the last.

    >>> ticks(4), ticks(48)
    ([1, 2, 3, 4], [1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48])
    """
    step = -(-layers // 16)
    step = step if step < 3 else 4 * -(-step // 4)
    return sorted({1, *range(step, layers + 1 - step // 2, step), layers})


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Return the centered moving average of ``values``.

    The triangular window reaches ``share`` of their number to each side. It is cut off at both ends, so the average has
    no lag.
    """
    half = max(1, round(share * len(values)))
    window = np.concatenate([np.arange(1, half + 1), np.arange(half + 1, 0, -1)]).astype(float)
    total = np.convolve(values, window)[half : half + len(values)]
    return total / np.convolve(np.ones(len(values)), window)[half : half + len(values)]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the contrast ratio of two sRGB colors in 0..1 (WCAG 2.2): 1 if they are equal, 21 for black on white.

    >>> round(contrast((0, 0, 0), (1, 1, 1)), 3)
    21.0
    """

    def luminance(rgb: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(color: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast on ``color``: 4.5 or more."""
    return "#000000" if contrast(color, (0, 0, 0)) >= contrast(color, (1, 1, 1)) else "#ffffff"
