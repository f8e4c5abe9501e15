"""Write the tables and plots of docs/results/evidence.md from the measurements of `benchmarks.evidence`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from matplotlib.ticker import LogFormatter

from benchmarks.common import markdown_table, replace_text, without_nan
from layerskip_jax.config import Config
from layerskip_jax.evaluation.pictures import PLAIN, Picture, exit_color, ticks

Parts = dict[str, Any]
END = "<!-- end -->"


def measured(parts: Parts, prefix: str) -> dict[str, Any]:
    """Return the measurements whose names start with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): part["measured"] for name, part in parts.items() if name.startswith(prefix)}


def by_variant(parts: Parts) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements of each variant's exits, one per seed."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for name, one in measured(parts, "quality/").items():
        if not name.endswith("-again"):
            variants.setdefault(name.rsplit("-", 1)[0], []).append(one)
    return variants


def mean_loss(seeds: list[dict[str, Any]]) -> np.ndarray:
    return np.mean([one["held_out_loss_by_exit"] for one in seeds], axis=0)


def fixed_settings(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the strategies with a fixed exit and draft length, for which the cost model predicts a speedup."""
    return [way for way in ways if way["predicted"] is not None]


def fastest_fixed(ways: list[dict[str, Any]]) -> dict[str, Any]:
    return max(fixed_settings(ways), key=lambda way: way["speedup"])


def compare_with_plain(plain_L: np.ndarray, loss_L: np.ndarray) -> tuple[str, str]:
    """Return plain's perplexity over this one's at the middle exit, and the change of the last exit's loss."""
    middle = len(loss_L) // 2 - 1
    return f"{np.exp(plain_L[middle] - loss_L[middle]):.2f}x", f"{loss_L[-1] / plain_L[-1] - 1:+.1%}"


def exits_table(parts: Parts) -> str:
    """Return the held-out loss of the exits, one row per variant, compared with the plain model."""
    variants = by_variant(parts)
    layers = len(mean_loss(next(iter(variants.values()))))
    shown = sorted({2, 3, 4, layers // 2, 2 * layers // 3, layers})
    rows = []
    for name, seeds in variants.items():
        loss = mean_loss(seeds)
        plain = variants.get("plain" + "".join(name.partition("@")[1:]))  # with the same width
        rows.append(
            [
                name,
                *(f"{loss[exit_layer - 1]:.3f}" for exit_layer in shown),
                f"{np.exp(loss[layers // 2 - 1]):.1f}",
                *(compare_with_plain(mean_loss(plain), loss) if plain else ("", "")),
            ]
        )
    middle = layers // 2
    head = ["variant", *(f"exit {exit_layer}" for exit_layer in shown)]
    return markdown_table(
        [*head, f"perplexity at exit {middle}", "plain's perplexity / this", "last exit's loss against plain"], rows
    )


def middle_table(parts: Parts) -> str:
    """Return the middle exit's perplexity during training, one row per variant."""
    rows = []
    for name, seeds in by_variant(parts).items():
        steps = seeds[0]["held_out_loss"]
        layers, last = len(seeds[0]["held_out_loss_by_exit"]), max(map(int, steps))
        points = [int(step) for step in steps if int(step) == last or round(10 * int(step) / last) in (1, 2, 5, 8)]
        each = [np.mean([one["held_out_loss"][str(step)] for one in seeds], axis=0) for step in points]
        rows.append([name, *(f"{np.exp(loss[layers // 2 - 1]):.1f}" for loss in each)])
        tokens = [seeds[0]["tokens"] * step / last / 1e6 for step in points]
    return markdown_table(["variant", *(f"{millions:.1f}M tokens" for millions in tokens)], rows)


def steps_table(parts: Parts) -> str:
    rows = [
        [name, f"{row['of_plain']:.3f}x", f"{row['tokens_per_second']:,.0f}"]
        for name, row in measured(parts, "steps")[""].items()
    ]
    return markdown_table(["variant", "step time over plain", "tokens/s"], rows)


def decoding_table(parts: Parts) -> str:
    """Return the fastest fixed setting and the other strategies, one row per variant and kind of prompt."""
    rows = []
    for name, one in measured(parts, "decoding/").items():
        for kind, ways in one["ways"].items():
            best = fastest_fixed(ways)
            same = all(way["identical"] for way in ways)
            others = [way for way in ways if way["name"] in ("adaptive", "confidence", "prompt_lookup")]
            rows.append(
                [
                    name, kind, f"{ways[0]['tokens_per_second']:,.0f}", best["name"], f"{best['acceptance']:.1%}",
                    f"{best['speedup']:.2f}x", f"{best['predicted']:.2f}x",
                    *(f"{way['speedup']:.2f}x" for way in others), "yes" if same else "NO",
                ]
            )  # fmt: skip
    head = ["variant", "prompts", "plain tokens/s", "fastest fixed", "acceptance", "speedup", "cost model"]
    return markdown_table([*head, "adaptive", "confidence", "prompt lookup", "same text"], rows)


def adaptive_table(parts: Parts) -> str:
    """Return the speedups of the best single setting for all kinds of prompt and of the adaptive policy."""
    rows = []
    for name, one in measured(parts, "decoding/").items():
        last = one["summary"][-1]
        values = (last["speedup"], last["adaptive"], last["adaptive/one_fixed"])
        rows.append([name, last["one_fixed_for_all"], *(f"{value:.2f}x" for value in values)])
    return markdown_table(
        ["variant", "best fixed setting", "fixed: speedup", "adaptive: speedup", "adaptive / fixed"], rows
    )


def temperature_table(parts: Parts) -> str:
    rows = []
    for name, one in measured(parts, "more/").items():
        cells = [f"{row['acceptance']:.1%}, {row['speedup']:.2f}x" for row in one["temperature"]]
        setting = f"E={one['exit_layer']} d={one['draft_length']}"
        rows.append([name, setting, *cells, f"{one['reuse']['with/without']:.2f}x"])
        temperatures = [row["temperature"] for row in one["temperature"]]
    head = [f"temperature {temperature:g}" for temperature in temperatures]
    return markdown_table(["variant", "setting", *head, "speedup by exit queries"], rows)


def runs_table(parts: Parts) -> str:
    """Return the cost, machine and commit of each run."""
    rows = []
    for name, part in parts.items():
        if name.startswith("quality/"):
            one, about = part["measured"], part["about"]
            minutes, millions = one["seconds"] / 60, one["tokens"] / 1e6
            loss = one["held_out_loss_by_exit"][-1]
            rows.append(
                [name.removeprefix("quality/"), f"{millions:.1f}M",
                 f"{minutes:.0f} min", f"{loss!r}", one["arrays"][:12], about["commit"]]
            )  # fmt: skip
    head = ["variant-seed", "tokens", "training", "last exit's loss", "SHA-256 of all arrays", "commit"]
    machines = sorted({part["about"]["machine"] for part in parts.values()})
    return markdown_table(head, rows) + "\n\nMeasured on: " + "; ".join(machines) + "."


TABLES = {
    "exits": exits_table,
    "middle": middle_table,
    "steps": steps_table,
    "decoding": decoding_table,
    "adaptive": adaptive_table,
    "temperature": temperature_table,
    "runs": runs_table,
}


def style(variant: str) -> dict[str, Any]:
    """Return the style of a variant's lines: that of plain models, or the next color."""
    return PLAIN if variant.partition("@")[0] == "plain" else {}


def number_log_axis(axis: Any) -> None:
    """Write 60 in place of 6 x 10^1 on a logarithmic axis."""
    for ticked in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticked(LogFormatter(minor_thresholds=(2, 0.5)))


def draw_training(path: Path, config: Config, parts: Parts) -> None:
    """Plot the perplexity of three exits (L/4, L/2, L) over tokens, one line per variant."""
    layers = config.model.num_layers
    shown = (layers // 4, layers // 2, layers)

    def draw(axes: np.ndarray) -> None:
        for axis, exit_layer in zip(axes, shown, strict=True):
            for name, seeds in by_variant(parts).items():
                steps = sorted(map(int, seeds[0]["held_out_loss"]))
                loss = [np.mean([one["held_out_loss"][str(step)][exit_layer - 1] for one in seeds]) for step in steps]
                tokens = np.array(steps) / steps[-1] * seeds[0]["tokens"] / 1e6
                axis.semilogy(tokens, np.exp(loss), marker=".", label=name, **style(name))
            axis.set(title=f"Exit {exit_layer} of {layers}", xlabel="million tokens", ylabel="held-out perplexity")
            number_log_axis(axis)
        axes[-1].legend()

    Picture(draw, panels=3, size=(15, 4.5)).save(epath.Path(path))


def draw_exits(path: Path, config: Config, parts: Parts) -> None:
    """Plot final perplexity and agreement by exit, one line per variant."""
    exits = range(1, config.model.num_layers + 1)

    def draw(axes: np.ndarray) -> None:
        for name, seeds in by_variant(parts).items():
            axes[0].semilogy(exits, np.exp(mean_loss(seeds)), marker="o", label=name, **style(name))
            agreement = np.mean([one["agreement_by_exit"] for one in seeds], axis=0)
            axes[1].plot(exits, agreement, marker="o", label=name, **style(name))
        axes[0].set(title="Held-out perplexity", xlabel="exit (blocks that run)", ylabel="perplexity")
        axes[1].set(title="Same next token as the full model", xlabel="exit (blocks that run)", ylim=(0, 1.05))
        axes[1].set_ylabel("share of tokens")
        number_log_axis(axes[0])
        for axis in axes:
            axis.set_xticks(ticks(len(exits)))
        axes[0].legend()

    Picture(draw).save(epath.Path(path))


def draw_speedups(path: Path, parts: Parts) -> None:
    """Plot the speedup over draft length on the first kind of prompt: one line per exit, one panel per variant."""
    decoded = measured(parts, "decoding/")

    def draw(axes: np.ndarray) -> None:
        for axis, (name, one) in zip(axes, decoded.items(), strict=True):
            kind, ways = next(iter(one["ways"].items()))
            lines: dict[int, list[dict[str, Any]]] = {}
            for way in fixed_settings(ways):
                lines.setdefault(way["settings"]["exit_layer"], []).append(way)
            for exit_layer, line in lines.items():
                lengths = [way["settings"]["draft_length"] for way in line]
                color = exit_color(1 + list(lines).index(exit_layer), len(lines))
                axis.plot(lengths, [way["speedup"] for way in line], marker="o", label=f"E={exit_layer}", color=color)
                axis.plot(lengths, [way["predicted"] for way in line], ":", color=color)
            axis.axhline(1.0, color="C9", linewidth=0.8)
            axis.set(title=f"{name}, {kind}", xlabel="draft length d", xticks=lengths)
        axes[0].set_ylabel("speedup (dotted: cost model)")
        axes[0].legend()

    Picture(draw, panels=len(decoded), size=(3.6 * len(decoded), 4)).save(epath.Path(path))


def write_page(page: Path, study: str, config: Config, parts: Parts) -> list[Path]:
    """Write the tables between the page's markers of this study, and plots and numbers next to it; return all files.

    A marker is ``<!-- evidence: STUDY TABLE -->``; the text from it to ``<!-- end -->`` is replaced. A new page starts
    with the markers only.
    """
    made = {name: make(parts) for name, make in TABLES.items() if name != "steps" or "steps" in parts}
    markers = {name: f"<!-- evidence: {study} {name} -->" for name in made}
    empty = "# Results\n\n" + "".join(f"{marker}\n{END}\n\n" for marker in markers.values())
    text = page.read_text(encoding="utf-8") if page.exists() else empty
    for name, marker in markers.items():
        if marker in text:
            before, rest = text.split(marker, 1)
            text = f"{before}{marker}\n\n{made[name]}\n\n{END}{rest.split(END, 1)[1]}"
    replace_text(page, text)
    folder = page.parent
    pictures = [folder / f"{study}_{name}.png" for name in ("training", "exits", "speed")]
    draw_training(pictures[0], config, parts)
    draw_exits(pictures[1], config, parts)
    draw_speedups(pictures[2], parts)
    published = folder / f"{study}.json"
    replace_text(published, json.dumps(without_nan(parts)) + "\n")
    return [page, *pictures, published]
