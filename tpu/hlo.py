"""FLOPs, estimated cycles and communication of a compiled program, parsed from its HLO text.

XLA's own cost analysis counts a loop body once. Here it counts once per iteration: the trip count comes from the
compiler's annotation, or from the constant in the loop's condition. The caller gives the shares of the branches of a
conditional.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
STARTS = ("async-start", "call-start")  # call-start: on a SparseCore
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

BranchShares = Callable[[str, int], Sequence[float]]
"""``(op_name, number of branches) -> share of the runs of a conditional that take each branch``; the sum is 1."""


def shares_by_scope(shares: Mapping[str, float]) -> BranchShares:
    """Return the shares of the branches of each conditional.

    A conditional traced in ``scope`` takes its true branch in the share ``shares[scope]`` of its runs; any other takes
    each branch equally often.
    """

    def branch_shares(op_name: str, branches: int) -> Sequence[float]:
        for scope, share in shares.items():
            if scope in op_name and branches == 2:
                return [1 - share, share]
        return [1 / branches] * branches

    return branch_shares


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the text after the operands
    is_root: bool

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A kind of collective."""

    kind: str
    overlapped: bool  # asynchronous, so that other work hides it
    between_slices: bool

    def __str__(self) -> str:
        where = " between slices" if self.between_slices else ""
        return f"{self.kind}{where}{'' if self.overlapped else ', exposed'}"


@dataclasses.dataclass
class Work:
    """The work of one device in one run of a program."""

    flops: float = 0.0
    cycles: float = 0.0
    """The TPU compiler's estimate for its fusions, memory traffic included; kernels and waiting are not in it."""
    collectives: float = 0.0
    """How many collectives the device takes part in."""
    received: dict[Transfer, float] = dataclasses.field(default_factory=dict)
    """Bytes that the device receives, by kind of collective."""
    operations: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Cycles and FLOPs by JAX's name of the traced operation, for operations with an estimate."""

    def add(self, other: "Work", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        self.collectives += times * other.collectives
        for name, (cycles, flops) in other.operations.items():
            before = self.operations.get(name, (0.0, 0.0))
            self.operations[name] = (before[0] + times * cycles, before[1] + times * flops)
        for transfer, size in other.received.items():
            self.received[transfer] = self.received.get(transfer, 0.0) + times * size


class Program:
    """The computations of an optimized HLO module. With several slices, each slice runs this program."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._text: dict[str, str] = {}
        entry = re.search(r"^ENTRY %?([\w.\-]+)", text, flags=re.M)
        if entry is None:
            raise ValueError("not the text of a compiled program: it has no ENTRY")
        self._entry = entry.group(1)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self._devices = int(partitions.group(1)) if partitions else 1
        for block in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}(?:,[^\n]*)?$", text, flags=re.M | re.S):
            parsed = [_instruction(line) for line in block.group(2).splitlines()]
            self._computations[block.group(1)] = {one.name: one for one in parsed if one}
            self._text[block.group(1)] = block.group(2)

    def work(self, branch_shares: BranchShares, unknown_trip_count: float = 1.0) -> Work:
        """Count the work of one run.

        ``unknown_trip_count`` applies to loops whose trip count is only known at run time.
        """
        self._unknown_trip_count = unknown_trip_count
        return self._count_computation(self._entry, branch_shares)

    def _count_computation(self, name: str, branch_shares: BranchShares) -> Work:
        work, channels = Work(), set[str]()
        for one in self._computations[name].values():
            if one.opcode == "while":
                body = one.attribute(r"body=%?([\w.\-]+)")
                work.add(self._count_computation(body, branch_shares), self._trip_count(one, body))
            elif one.opcode == "conditional":
                branches = re.findall(r"%?([\w.\-]+)", one.attribute(r"branch_computations=\{([^}]*)\}"))
                branches = branches or [
                    one.attribute(rf"{which}_computation=%?([\w.\-]+)") for which in ("false", "true")
                ]
                shares = branch_shares(one.attribute(r'op_name="([^"]*)"'), len(branches))
                for branch, share in zip(branches, shares, strict=True):
                    work.add(self._count_computation(branch, branch_shares), share)
            else:
                part = Work(cycles=float(one.attribute(r'"estimated_cycles":"(\d+)"') or 0))
                self._add_instruction(part, name, one, channels)
                if part.cycles:
                    part.operations[one.attribute(r'op_name="([^"]*)"') or one.name] = (part.cycles, part.flops)
                work.add(part)
        return work

    def _add_instruction(self, work: Work, name: str, one: Instruction, channels: set[str]) -> None:
        if one.opcode in ("convolution", "dot"):
            work.flops += self._matmul_flops(name, one)
        elif one.opcode == "recv" and "megascale" in one.rest:
            self._receive_from_slices(work, one)
        elif one.opcode.removesuffix("-start") in COLLECTIVES:
            self._receive(work, name, one, overlapped=one.opcode.endswith("-start"))
        elif one.opcode in ("fusion", "call", *STARTS):
            called = one.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
            for inner in self._computations[called].values():
                if inner.opcode in COLLECTIVES:
                    # A collective split over several fusions appears in each of them, with one channel: count it once.
                    channel = inner.attribute(r"channel_id=(\d+)")
                    if channel not in channels:
                        self._receive(work, called, inner, one.opcode in STARTS or self._is_overlapped(called))
                    channels.add(channel)
                else:
                    self._add_instruction(work, called, inner, channels)

    def _is_overlapped(self, fusion: str) -> bool:
        return fusion.startswith("async_collective") or "AsyncCollective" in self._text[fusion]

    def _trip_count(self, loop: Instruction, body: str) -> float:
        """Return ``limit / step`` of a loop that counts from 0. The step is above 1 if XLA has unrolled the loop."""
        if noted := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return float(noted)
        condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        steps, limits = self._computations[body], [_constant(one) for one in condition.values()]
        if not any(limits):
            return self._unknown_trip_count
        compare = next((one for one in condition.values() if one.opcode == "compare"), None)
        counter = condition.get(compare.operands[0]) if compare else None
        root = next(one for one in steps.values() if one.is_root)
        if counter is None or counter.opcode != "get-tuple-element" or root.opcode != "tuple":
            return max(limits)
        update = steps[root.operands[int(counter.attribute(r"index=(\d+)"))]]
        increments = [_constant(steps[operand]) for operand in update.operands if operand in steps]
        return -(-max(limits) // max([1, *increments])) if update.opcode == "add" else max(limits)

    def _matmul_flops(self, computation: str, one: Instruction) -> float:
        known = self._computations[computation]
        left, right = (_dimensions(known[operand].shape) for operand in one.operands[:2])
        out = _dimensions(one.shape)
        if one.opcode == "dot":
            contracted = re.findall(r"\d+", one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
            return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted)
        return _convolution_flops(left, right, out, one)

    def _receive(self, work: Work, computation: str, one: Instruction, overlapped: bool) -> None:
        kind, known = one.opcode.removesuffix("-start"), self._computations[computation]
        size = sum(_bytes(known[operand].shape) for operand in one.operands if operand in known)
        n = len(device_groups(one.rest, self._devices)[0])
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the fusion keeps only the shard of its device
        received = {
            "all-gather": size * (n - 1),
            "reduce-scatter": size * (n - 1) / n,
            "all-reduce": 2 * size * (n - 1) / n,
            "all-to-all": size * (n - 1) / n,
            "collective-permute": size,
        }[kind]
        transfer = Transfer(kind, overlapped, between_slices=False)
        work.collectives += 1
        work.received[transfer] = work.received.get(transfer, 0.0) + received

    def _receive_from_slices(self, work: Work, one: Instruction) -> None:
        """Count what the hosts exchange over the data-center network; tpu/compile_ahead.py adds its time in full."""
        kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
        slices = len(one.attribute(r'_xla_megascale_target="\{([\d,]*)\}').split(","))
        size = _bytes(one.shape[: one.shape.index("]") + 1])
        transfer = Transfer(kind, overlapped=True, between_slices=True)
        received = 2 * size * (slices - 1) / slices if kind == "all-reduce" else size
        work.received[transfer] = work.received.get(transfer, 0.0) + received


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Return the groups of devices of a collective, or the pairs of a permutation.

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
    """Return the value of an integer constant, or 0 for any other instruction."""
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
    """Return the bytes of an array, or of all arrays of a tuple.

    >>> _bytes("(bf16[2,3]{1,0}, f32[])")
    16
    """
    return sum(
        ITEM_BYTES.get(kind, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def _convolution_flops(left: list[int], right: list[int], out: list[int], one: Instruction) -> float:
    """Return the FLOPs of a matmul in XLA:TPU's form, a convolution: 2 for each multiplied pair of elements.

    Along a spatial dimension, pairs do not count whose input element is padding or a hole of the dilation.
    So a batched matmul, which becomes a convolution with a padded window, counts once.
    """
    inputs, kernel, outputs = re.split(r"_|->", one.attribute(r"dim_labels=([\w>\-]+)"))
    spatial = [label for label in inputs if label.isdigit()]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", one.attribute(r"window=\{([^}]*)\}")))

    def window_sizes(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    pairs = 1.0
    for label in sorted(spatial):
        place = int(label)
        low = int(window_sizes("pad", "0_0")[place].split("_")[0])
        stride, base, dilate = (int(window_sizes(key, "1")[place]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        size, taps, places = left[inputs.index(label)], right[kernel.index(label)], out[outputs.index(label)]
        at = np.arange(places)[:, None] * stride + np.arange(taps)[None] * dilate - low
        pairs *= np.count_nonzero((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0))
    batch, features = out[outputs.index("b")], out[outputs.index("f")]
    return 2.0 * pairs * batch * features * right[kernel.index("i")]
