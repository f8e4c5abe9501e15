"""The Markdown page of `benchmarks.accelerator`: the tables of a results file."""

from collections.abc import Callable
from typing import Any

from benchmarks.common import markdown_table

Measured = dict[str, Any]


def cell(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """Format a number, or return a dash for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def device_section(device: Measured) -> str:
    memory = device["memory_bytes"]
    changed = ", with uncommitted changes" if device["changed"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in device["environment"].items())
    rows = [
        ["devices", f"{device['count']} x {device['kind']}"],
        ["memory per device", cell(memory and memory / 2**30, ".1f", " GiB available to programs")],
        ["host", device["host"]],
        ["runtime", " ".join(device["runtime"].split())],
        ["Python", device["python"]],
        ["packages", versions],
        ["environment", settings or "-"],
        ["commit", device["commit"] + changed],
        ["date", device["date"]],
        ["command", f"`{device['command']}`"],
    ]
    return markdown_table(["", ""], rows)


def rates_section(parts: dict[str, Measured]) -> str:
    rate = parts[""]
    rows = []
    for name, unit, sheet in (
        ("flops", "TFLOP/s", "sheet_flops"),
        ("copy_bandwidth", "TB/s", "sheet_bandwidth"),
        ("read_bandwidth", "TB/s", "sheet_bandwidth"),
    ):
        operation = {
            "flops": f"matmul of {rate['matmul_size']} x {rate['matmul_size']} matrices, {rate['matmul_dtype']}",
            "copy_bandwidth": f"negation of {rate['megabytes']} MiB in place: reads and writes",
            "read_bandwidth": f"sum of {rate['megabytes']} MiB: reads",
        }[name]
        share = rate[name] / rate[sheet] if rate[sheet] else None
        data_sheet = cell(rate[sheet] and rate[sheet] / 1e12, ",.3f", f" {unit}")
        rows.append([operation, f"{rate[name] / 1e12:,.3f} {unit}", data_sheet, cell(share, ".0%")])
    return "One device, fastest of five repeats.\n\n" + markdown_table(["", "measured", "data sheet", "share"], rows)


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
        f"In bfloat16: {shape}; {one['documents']} packed documents. Each error is the largest difference from XLA's "
        "float32 attention over the largest value; the errors of `xla` are due to bfloat16 alone.\n\n"
        + markdown_table(
            ["backend", "error of the output", "error of the gradients", "forward and backward [ms]"], rows
        )
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
    head = ["recipe", "median step [s]", "tokens/s", "MFU", "of the measured matmul rate", "time over plain",
            "temporaries [GiB]", "compile time [s]"]  # fmt: skip
    mesh = ", ".join(f"{axis} {size}" for axis, size in step["mesh"].items() if size > 1) or "one device"
    peak = step["peak_bytes"]
    refused = "".join(f"\n\nOut of memory: {tried}." for tried in step["out_of_memory"])
    return (
        f"{step['model']} ({step['parameters'] / 1e9:.2f}B parameters), {step['batch_size']} x {step['length']} random "
        f"tokens, AdamW, remat {step['remat']}, attention {step['attention']}; {mesh}. {step['steps']} steps of each "
        f"recipe, in turn; target: at most {step['bar']}x the plain step. Peak memory of a device so far: "
        f"{cell(peak and peak / 2**30, '.1f', ' GiB')}.\n\n{markdown_table(head, rows)}{refused}"
    )


SPECULATION = ["acceptance", "tokens per round", "tokens/s", "speedup", "cost model", "measured / cost model",
               "same text as plain"]  # fmt: skip


def speculation(one: Measured) -> list[str]:
    same = "yes" if one["identical"] else f"first {one['same_tokens']:.1%}"
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
        [rows, f"{setting['forced']:.1f}", *speculation(setting)]
        for rows, part in parts.items()
        for setting in part["speculative"]
    ]
    return (
        f"One device; {one['shape']['num_layers']} layers x {one['shape']['dim']} with random weights "
        f"({one['weight_bytes'] / 1e9:.3f} GB); a cache of {one['cache']} positions, {one['prompt']} prompt tokens and "
        f"{one['new_tokens']} new tokens, greedy. The limit assumes that each pass only reads all weights at the "
        "measured bandwidth.\n\n"
        + markdown_table(["rows", "plain tokens/s", "limit", "share of the limit", "expected text"], plain)
        + f"\n\nSelf-speculative decoding from exit {one['exit_layer']} with {one['draft_length']} drafts per round; "
        "the acceptance is forced.\n\n" + markdown_table(["rows", "forced acceptance", *SPECULATION], forced)
    )


def trained_section(parts: dict[str, Measured]) -> str:
    run = parts[""]
    exits = zip(run["held_out_loss_by_exit"], run["agreement_by_exit"], strict=True)
    by_exit = [
        [str(number), cell(loss, ".3f"), cell(agrees, ".1%")] for number, (loss, agrees) in enumerate(exits, start=1)
    ]
    settings = [
        [
            f"E={setting['exit_layer']} d={setting['draft_length']}",
            f"{setting['plain_tokens_per_second']:,.0f}",
            *speculation(setting),
        ]
        for setting in run["speculative"]
    ]
    return (
        f"{run['shape']['num_layers']} layers x {run['shape']['dim']}, {run['steps']} steps of "
        f"{run['batch_size']} x {run['length']} tokens in {run['seconds']:.0f} s ({run['tokens_per_second']:,.0f} "
        f"tokens/s); the corpus has about {run['corpus_tokens'] / 1e6:.1f}M tokens.\n\n"
        + markdown_table(["exit", "held-out loss", "agreement with the last exit"], by_exit)
        + f"\n\n{run['prompts']} held-out prompts, one at a time, {run['new_tokens']} new tokens each, greedy.\n\n"
        + markdown_table(["setting", "plain tokens/s", *SPECULATION], settings)
    )


SECTIONS: dict[str, Callable[[dict[str, Measured]], str]] = {
    "rates": rates_section, "attention": attention_section, "training": training_section,
    "decoding": decoding_section, "trained": trained_section,
}  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """Return the page of a results file: per section its tables, and a line for each skipped or failed part."""
    device = results["device"]
    # `orphan`: no toctree contains this page, which Sphinx would warn about.
    blocks = ["---\norphan: true\n---", f"# {device['count']} x {device['kind']}"]
    if device["tiny"]:
        blocks.append("A test with tiny shapes: these numbers do not describe the device.")
    blocks += ["## device", device_section(device)]
    for section, lay_out in SECTIONS.items():
        parts = {name: part for name, part in results["parts"].items() if name.split("/")[0] == section}
        measured = {name.partition("/")[2]: part["measured"] for name, part in parts.items() if "measured" in part}
        blocks += [f"## {section}", *([lay_out(measured)] if measured else [])]
        for name, part in parts.items():
            blocks += [f"- {name}, {word}: {part[word]}" for word in ("skipped", "error") if word in part]
    return "\n\n".join(blocks) + "\n"
