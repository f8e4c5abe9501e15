"""Reads what a compiled program will do out of its text: products, cycles, what goes between devices; loops counted.

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it turns (as the compiler notes,
or by the constant that its condition compares with), and a conditional as often as the caller says.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
STARTS = ("async-start", "call-start")  # the second where a SparseCore does it
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

Choice = Callable[[str, int], Sequence[float]]
"""``(op_name, branches) -> how often each branch of a conditional runs``, 1 in all."""


def taken_in(shares: Mapping[str, float]) -> Choice:
    """Let conditionals traced in a named scope be true in its share of their runs; others take all branches alike."""

    def choose(op_name: str, branches: int) -> Sequence[float]:
        for scope, share in shares.items():
            if scope in op_name and branches == 2:
                return [1 - share, share]
        return [1 / branches] * branches

    return choose


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # all that follows the operands
    is_root: bool

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Bytes that a device receives through one kind of collective."""

    kind: str
    overlapped: bool  # runs beside other work
    between_slices: bool

    def __str__(self) -> str:
        where = " between slices" if self.between_slices else ""
        return f"{self.kind}{where}{'' if self.overlapped else ', exposed'}"


@dataclasses.dataclass
class Work:
    """What one device does in one run of a program."""

    flops: float = 0.0
    cycles: float = 0.0
    """What the TPU compiler's own cost model says of its fusions, memory included; nothing of kernels and waits."""
    received: dict[Transfer, float] = dataclasses.field(default_factory=dict)
    operations: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Cycles and flops by the name that JAX gave what was traced, of all that the cost model knows."""

    def add(self, other: "Work", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        for name, (cycles, flops) in other.operations.items():
            before = self.operations.get(name, (0.0, 0.0))
            self.operations[name] = (before[0] + times * cycles, before[1] + times * flops)
        for transfer, size in other.received.items():
            self.received[transfer] = self.received.get(transfer, 0.0) + times * size


class Program:
    """The computations of an optimized module: on several slices, what each of them runs."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._text: dict[str, str] = {}
        entry = re.search(r"^ENTRY %?([\w.\-]+)", text, flags=re.M)
        if entry is None:
            raise ValueError("this is no text of a compiled program: it has no ENTRY")
        self._entry = entry.group(1)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self._devices = int(partitions.group(1)) if partitions else 1
        for block in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}(?:,[^\n]*)?$", text, flags=re.M | re.S):
            parsed = [_instruction(line) for line in block.group(2).splitlines()]
            self._computations[block.group(1)] = {one.name: one for one in parsed if one}
            self._text[block.group(1)] = block.group(2)

    def work(self, choose: Choice, unknown_turns: float = 1.0) -> Work:
        """Count one run. ``choose`` says how often a conditional takes each branch.

        ``unknown_turns`` is how often a loop turns whose end is known only while the program runs.
        """
        self._unknown_turns = unknown_turns
        return self._of_computation(self._entry, choose)

    def _of_computation(self, name: str, choose: Choice) -> Work:
        work, chains = Work(), set[str]()
        for one in self._computations[name].values():
            if one.opcode == "while":
                body = one.attribute(r"body=%?([\w.\-]+)")
                work.add(self._of_computation(body, choose), self._turns(one, body))
            elif one.opcode == "conditional":
                branches = re.findall(r"%?([\w.\-]+)", one.attribute(r"branch_computations=\{([^}]*)\}"))
                branches = branches or [
                    one.attribute(rf"{which}_computation=%?([\w.\-]+)") for which in ("false", "true")
                ]
                often = choose(one.attribute(r'op_name="([^"]*)"'), len(branches))
                for branch, times in zip(branches, often, strict=True):
                    work.add(self._of_computation(branch, choose), times)
            else:
                part = Work(cycles=float(one.attribute(r'"estimated_cycles":"(\d+)"') or 0))
                self._add_instruction(part, name, one, chains, choose)
                if part.cycles:
                    part.operations[one.attribute(r'op_name="([^"]*)"') or one.name] = (part.cycles, part.flops)
                work.add(part)
        return work

    def _add_instruction(self, work: Work, name: str, one: Instruction, chains: set[str], choose: Choice) -> None:
        if one.opcode in ("convolution", "dot"):
            work.flops += self._product(name, one)
        elif one.opcode == "recv" and "megascale" in one.rest:
            self._receive_from_slices(work, one)
        elif one.opcode.removesuffix("-start") in COLLECTIVES:
            self._receive(work, name, one, overlapped=one.opcode.endswith("-start"))
        elif one.opcode in ("fusion", "call", *STARTS):
            called = one.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
            for inner in self._computations[called].values():
                if inner.opcode in COLLECTIVES:
                    # A gather that is spread over several fusions shows in each, under one channel: it is one.
                    channel = inner.attribute(r"channel_id=(\d+)")
                    if channel not in chains:
                        self._receive(work, called, inner, one.opcode in STARTS or self._is_overlapped(called))
                    chains.add(channel)
                else:
                    self._add_instruction(work, called, inner, chains, choose)

    def _is_overlapped(self, fusion: str) -> bool:
        return fusion.startswith("async_collective") or "AsyncCollective" in self._text[fusion]

    def _turns(self, loop: Instruction, body: str) -> float:
        """Return ``limit / step`` of a loop that counts from 0; where XLA has unrolled it, the step is not 1."""
        if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return float(noted)
        tests = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        steps, limits = self._computations[body], [_constant(one) for one in tests.values()]
        if not any(limits):
            return self._unknown_turns
        compare = next((one for one in tests.values() if one.opcode == "compare"), None)
        counter = tests.get(compare.operands[0]) if compare else None
        root = next(one for one in steps.values() if one.is_root)
        if counter is None or counter.opcode != "get-tuple-element" or root.opcode != "tuple":
            return max(limits)
        counted = steps[root.operands[int(counter.attribute(r"index=(\d+)"))]]
        by = [_constant(steps[operand]) for operand in counted.operands if operand in steps]
        return -(-max(limits) // max([1, *by])) if counted.opcode == "add" else max(limits)

    def _product(self, computation: str, one: Instruction) -> float:
        known = self._computations[computation]
        left, right = (_dimensions(known[operand].shape) for operand in one.operands[:2])
        out = _dimensions(one.shape)
        if one.opcode == "dot":
            contracted = re.findall(r"\d+", one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
            return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted)
        return _convolution(left, right, out, one)

    def _receive(self, work: Work, computation: str, one: Instruction, overlapped: bool) -> None:
        kind, known = one.opcode.removesuffix("-start"), self._computations[computation]
        size = sum(_bytes(known[operand].shape) for operand in one.operands if operand in known)
        n = len(device_groups(one.rest, self._devices)[0])
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the fusion keeps a device's own part alone
        received = {
            "all-gather": size * (n - 1),
            "reduce-scatter": size * (n - 1) / n,
            "all-reduce": 2 * size * (n - 1) / n,
            "all-to-all": size * (n - 1) / n,
            "collective-permute": size,
        }[kind]
        transfer = Transfer(kind, overlapped, between_slices=False)
        work.received[transfer] = work.received.get(transfer, 0.0) + received

    def _receive_from_slices(self, work: Work, one: Instruction) -> None:
        """Count what the hosts exchange over the data-center network, which goes on beside the program."""
        kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
        slices = len(one.attribute(r'_xla_megascale_target="\{([\d,]*)\}').split(","))
        size = _bytes(one.shape[: one.shape.index("]") + 1])
        transfer = Transfer(kind, overlapped=True, between_slices=True)
        received = 2 * size * (slices - 1) / slices if kind == "all-reduce" else size
        work.received[transfer] = work.received.get(transfer, 0.0) + received


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Return which devices exchange something with each other in a collective; of a permutation, its pairs.

    >>> device_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4), device_groups("source_target_pairs={{0,1},{1,0}}", 2)
    ([[0, 2], [1, 3]], [[0, 1], [1, 0]])
    """
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        taken = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[2])]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        ids = np.moveaxis(ids, taken, range(-len(taken), 0))
        return ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(taken) :])).tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dimensions = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(dimensions))
        ids = np.arange(math.prod(dimensions)).reshape(dimensions).transpose(*order)
        return ids.reshape(int(found[1]), int(found[2])).tolist()
    return [list(range(devices))]


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    shape = line[start:end]
    opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    first = end + opcode.end()
    last = _closing(line, first - 1)
    operands = re.findall(r"%([\w.\-]+)", line[first : last - 1]) or [line[first : last - 1]]
    return Instruction(
        found.group(1), shape, opcode.group(1), tuple(operands), line[last:], "ROOT " in line[: found.end()]
    )


def _constant(one: Instruction) -> int:
    """Return the value of a constant whole number, 0 for anything else."""
    is_number = one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0])
    return int(one.operands[0]) if is_number else 0


def _closing(line: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    return len(line)


def _dimensions(shape: str) -> list[int]:
    found = re.match(r"\(*\w+\[([\d,]*)\]", shape)
    return [int(size) for size in found.group(1).split(",") if size] if found else []


def _bytes(shape: str) -> float:
    """Return the size of an array, or of all arrays of a tuple.

    >>> _bytes("(bf16[2,3]{1,0}, f32[])")
    16
    """
    return sum(
        ITEM_BYTES.get(kind, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def _convolution(left: list[int], right: list[int], out: list[int], one: Instruction) -> float:
    """Count a product in the form that XLA:TPU gives it: ``2 x`` the pairs of elements that really meet.

    Along a spatial dimension, an output position and a kernel position meet where the padded, dilated input has an
    element of its own. So a batch of products, which becomes a convolution with a padded window, counts once.
    """
    inputs, kernel, outputs = re.split(r"_|->", one.attribute(r"dim_labels=([\w>\-]+)"))
    spatial = [label for label in inputs if label.isdigit()]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", one.attribute(r"window=\{([^}]*)\}")))

    def of(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    met = 1.0
    for label in sorted(spatial):
        place = int(label)
        low = int(of("pad", "0_0")[place].split("_")[0])
        stride, base, dilate = (int(of(key, "1")[place]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        size, taps, places = left[inputs.index(label)], right[kernel.index(label)], out[outputs.index(label)]
        at = np.arange(places)[:, None] * stride + np.arange(taps)[None] * dilate - low
        met *= np.count_nonzero((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0))
    batch, features = out[outputs.index("b")], out[outputs.index("f")]
    return 2.0 * met * batch * features * right[kernel.index("i")]
