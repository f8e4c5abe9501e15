"""The page of `benchmarks.accelerator`: what its results file holds, as tables."""

from collections.abc import Callable
from typing import Any

Measured = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """Format a number, or a dash where it was not measured."""
    return "-" if value is None else f"{value:{form}}{unit}"


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def device_section(device: Measured) -> str:
    memory = device["memory_bytes"]
    changed = ", with changes that are not committed" if device["changed"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in device["environment"].items())
    rows = [
        ["devices", f"{device['count']} x {device['kind']}"],
        ["memory of one", cell(memory and memory / 2**30, ".1f", " GiB for programs")],
        ["host", device["host"]],
        ["runtime", " ".join(device["runtime"].split())],
        ["Python", device["python"]],
        ["packages", versions],
        ["environment", settings or "-"],
        ["commit", device["commit"] + changed],
        ["date", device["date"]],
        ["command", f"`{device['command']}`"],
    ]
    return table(["", ""], rows)


def rates_section(parts: dict[str, Measured]) -> str:
    rate = parts[""]
    rows = []
    for name, unit, sheet in (
        ("flops", "TFLOP/s", "sheet_flops"),
        ("copy_bandwidth", "TB/s", "sheet_bandwidth"),
        ("read_bandwidth", "TB/s", "sheet_bandwidth"),
    ):
        what = {
            "flops": f"matrix product, {rate['matmul_size']} cubed, {rate['matmul_dtype']}",
            "copy_bandwidth": f"copy in place of {rate['megabytes']} MiB, reads and writes",
            "read_bandwidth": f"sum of {rate['megabytes']} MiB, reads",
        }[name]
        share = rate[name] / rate[sheet] if rate[sheet] else None
        data_sheet = cell(rate[sheet] and rate[sheet] / 1e12, ",.3f", f" {unit}")
        rows.append([what, f"{rate[name] / 1e12:,.3f} {unit}", data_sheet, cell(share, ".0%")])
    return "One device, best of five.\n\n" + table(["", "measured", "data sheet", "share"], rows)


def attention_section(parts: dict[str, Measured]) -> str:
    one = next(iter(parts.values()))
    shape = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in one["shape"].items())
    rows = [
        [
            name,
            cell(part["output_difference"], ".2e"),
            cell(part["gradient_difference"], ".2e"),
            f"{1e3 * part['seconds']:.2f}",
        ]
        for name, part in parts.items()
    ]
    return (
        f"In bfloat16: {shape}; {one['documents']} documents packed. Differences are the largest ones from XLA's "
        "attention in float32, as a share of the largest value; those of `xla` show what bfloat16 alone does.\n\n"
        + table(["backend", "output", "gradients", "forward and backward [ms]"], rows)
    )


def training_section(parts: dict[str, Measured]) -> str:
    step = parts[""]
    rows = [
        [
            name, f"{one['seconds']:.4f}", f"{one['tokens_per_second']:,.0f}", cell(one["mfu"], ".1%"),
            cell(one["mfu_of_measured"], ".1%"), f"{one['of_plain']:.3f}x",
            f"{one['temporary_bytes'] / 2**30:.2f}", f"{one['compile_seconds']:.0f}",
        ]
        for name, one in step["recipes"].items()
    ]  # fmt: skip
    head = ["recipe", "median step [s]", "tokens/s", "MFU", "of the measured rate", "of the first",
            "temporaries [GiB]", "compiled in [s]"]  # fmt: skip
    mesh = ", ".join(f"{axis} {size}" for axis, size in step["mesh"].items() if size > 1) or "one device"
    peak = step["peak_bytes"]
    refused = "".join(f"\n\nOut of memory: {tried}." for tried in step["out_of_memory"])
    return (
        f"{step['model']} ({step['parameters'] / 1e9:.2f}B parameters), {step['batch_size']} x {step['length']} random "
        f"tokens, AdamW, remat {step['remat']}, attention {step['attention']}; {mesh}. {step['steps']} steps of each "
        f"recipe, in turn; the bar is {step['bar']}x the plain step. Peak memory of a device until then: "
        f"{cell(peak and peak / 2**30, '.1f', ' GiB')}.\n\n{table(head, rows)}{refused}"
    )


SPECULATION = ["accepted of drafted", "tokens a round", "tokens/s", "speed-up", "by bytes", "measured / by bytes",
               "text of plain decoding"]  # fmt: skip


def speculation(one: Measured) -> list[str]:
    same = "yes" if one["identical"] else f"the first {one['same_tokens']:.1%}"
    return [
        cell(one["acceptance"], ".3f"), cell(one["tokens_per_round"], ".2f"), cell(one["tokens_per_second"]),
        cell(one["speedup"], ".2f", "x"), cell(one["predicted"], ".2f", "x"),
        cell(one["speedup"] / one["predicted"], ".2f"), same,
    ]  # fmt: skip


def decoding_section(parts: dict[str, Measured]) -> str:
    one = next(iter(parts.values()))
    plain = [
        [rows, f"{part['plain_tokens_per_second']:,.1f}", cell(part["limit_tokens_per_second"], ",.1f"),
         cell(part["of_limit"], ".1%"), yes(part["right"])]
        for rows, part in parts.items()
    ]  # fmt: skip
    forced = [
        [rows, f"{way['forced']:.1f}", *speculation(way)] for rows, part in parts.items() for way in part["speculative"]
    ]
    return (
        f"One device; {one['shape']['num_layers']} layers x {one['shape']['dim']} with random weights of "
        f"{one['weight_bytes'] / 1e9:.3f} GB a pass; a cache of {one['cache']}, {one['prompt']} tokens in and "
        f"{one['new_tokens']} out, greedy. The limit is that of reading the weights at the measured bandwidth.\n\n"
        + table(["rows", "plain tokens/s", "limit", "share", "the known text"], plain)
        + f"\n\nSelf-speculation from exit {one['exit_layer']} with {one['draft_length']} drafts a round; how many are "
        "accepted is forced.\n\n" + table(["rows", "forced", *SPECULATION], forced)
    )


def trained_section(parts: dict[str, Measured]) -> str:
    run = parts[""]
    exits = zip(run["held_out_loss_by_exit"], run["agreement_by_exit"], strict=True)
    by_exit = [
        [str(number), cell(loss, ".3f"), cell(agrees, ".1%")] for number, (loss, agrees) in enumerate(exits, start=1)
    ]
    ways = [
        [f"E={way['exit_layer']} d={way['draft_length']}", f"{way['plain_tokens_per_second']:,.0f}", *speculation(way)]
        for way in run["speculative"]
    ]
    return (
        f"{run['shape']['num_layers']} layers x {run['shape']['dim']}, {run['steps']} steps of "
        f"{run['batch_size']} x {run['length']} tokens in {run['seconds']:.0f} s ({run['tokens_per_second']:,.0f} "
        f"tokens/s); the corpus has about {run['corpus_tokens'] / 1e6:.1f}M.\n\n"
        + table(["exit", "held-out loss", "next token as the last exit's"], by_exit)
        + f"\n\n{run['prompts']} held-out prompts, one at a time, {run['new_tokens']} new tokens each, greedy.\n\n"
        + table(["setting", "plain tokens/s", *SPECULATION], ways)
    )


SECTIONS: dict[str, Callable[[dict[str, Measured]], str]] = {
    "rates": rates_section, "attention": attention_section, "training": training_section,
    "decoding": decoding_section, "trained": trained_section,
}  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """Return the page of a results file: a table for every section, or a line that says why there is none."""
    device = results["device"]
    # No page leads here by itself, and Sphinx wants to be told so.
    blocks = ["---\norphan: true\n---", f"# {device['count']} x {device['kind']}"]
    if device["tiny"]:
        blocks.append("Tiny shapes, to see that all of it runs: these numbers say nothing of the device.")
    blocks += ["## device", device_section(device)]
    for section, lay_out in SECTIONS.items():
        parts = {name: part for name, part in results["parts"].items() if name.split("/")[0] == section}
        measured = {name.partition("/")[2]: part["measured"] for name, part in parts.items() if "measured" in part}
        blocks += [f"## {section}", *([lay_out(measured)] if measured else [])]
        for name, part in parts.items():
            blocks += [f"- {name}, {word}: {part[word]}" for word in ("skipped", "error") if word in part]
    return "\n\n".join(blocks) + "\n"
