"""Damage the files of model folders at random, and open them: ``python -m benchmarks.fuzz [--inputs 50000]``.

Every input is a changed copy of a good file: changed bytes, or another value somewhere in its JSON or protobuf. Opening
it may work or raise `UserError`. Everything else is a finding: another exception, a crash, more than `HANG_SECONDS`, a
file that is opened outside the folder or for writing, a program or a connection that is started. The exit status is 1
if there is any. A finding prints the seed of its input: ``--only FILE --seed N --inputs 1`` repeats it.
"""

import argparse
import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_proto
from etils import epath
from safetensors.numpy import load_file, save_file

from layerskip_jax.checkpoint.huggingface.weights import INDEX, SINGLE
from layerskip_jax.checkpoint.reading import load_model, open_model_folder
from layerskip_jax.checkpoint.run_folder import find_checkpoint, json_sha256, read_config, read_data_positions
from layerskip_jax.checkpoint.swept import SWEPT, store_swept, swept_settings
from layerskip_jax.commands.export import export_model
from layerskip_jax.commands.plots import read_metrics
from layerskip_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER, train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.training.loop import train

HANG_SECONDS = 60
CURRENT = "seed"
"""Name of the file with the seed of the current input, which a process that dies leaves for its parent."""
FOUND = 3
"""Exit status of a process with findings. Python and faulthandler use 1 and 2 themselves."""
MEMORY = 64 << 30
"""Limit on a process's address space. An array whose size comes from the damage exceeds it."""

DEEP = "a deeply nested value"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, -(10**30)),
    *(0.5, -1.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "\0", "\ud800", "\u2581", "x" * 5000, "/etc/passwd", "../../secret"),
    *("http://localhost:1/x", "1", "true"),
    *([], {}, [[]], [None], [1], ["x"], {"": None}, {"x": {"y": []}}, DEEP),
]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EXECUTES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
PIECES = ("", "\0", " ", "<0x41>", "<0xZZ>", "<s>", "\u2581")
TEXT = "def f(x):\n\treturn x  # \u6f22\u5b57 \u2581 <s></s>"


# Changes


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Overwrite, insert, remove, repeat or cut a few ranges of bytes."""
    result = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        start = draw.randrange(len(result) + 1)
        size = draw.choice([1, 1, 2, 8, 100])
        new = draw.randbytes(size) if draw.random() < 0.7 else draw.choice([b"\0", b"\xff", b'"', b"[", b"{"]) * size
        kind = draw.randrange(8)
        if kind < 4:
            result[start : start + len(new)] = new
        elif kind < 6:
            result[start : start + draw.choice([0, size])] = new * draw.choice([0, 1])
        elif kind == 6:
            result[start:start] = result[start : start + size]
        else:
            del result[start:]
    return bytes(result)


def change_value(value: Any, draw: random.Random) -> Any:
    """Replace, remove, add or exchange a few parts of a JSON value."""
    result = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        parents, stack = [], [result]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list) and part:
                parents.append(part)
                stack.extend(part.values() if isinstance(part, dict) else part)
        if not parents:
            return draw.choice(VALUES)
        # Choose the container first, so that the many values of a vocabulary do not crowd out small lists.
        parent, other = draw.choice(parents), draw.choice(parents)
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        match draw.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw.choice(["x", "", *map(str, parent)])] = parent.pop(key)
            case 2:
                parent[key] = copy.deepcopy(draw.choice(list(other.values()) if isinstance(other, dict) else other))
            case _:
                parent[key] = copy.deepcopy(draw.choice(VALUES))
    return draw.choice(VALUES) if draw.random() < 0.01 else result


def change_json(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return change_bytes(content, draw)
    text = json.dumps(change_value(json.loads(content), draw))
    return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


def change_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = change_json(lines[number], draw)
    return b"\n".join(lines) if draw.random() < 0.8 else change_bytes(content, draw)


def change_safetensors(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return change_bytes(content[: 8 + int.from_bytes(content[:8], "little")], draw)
    size = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + size], draw)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, size, 2**32, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + header + content[8 + size :]


def change_sentencepiece(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return change_bytes(content, draw)
    model = sentencepiece_proto.ModelProto.FromString(content)
    for _ in range(draw.choice([1, 2, 5])):
        piece = draw.choice(model.pieces)
        match draw.randrange(6):
            case 0:
                piece.piece = draw.choice([*PIECES, draw.choice(model.pieces).piece])
            case 1:
                piece.type = draw.randrange(1, 7)
            case 2:
                piece.score = draw.choice([0.0, -1e30, 1e30, float("nan"), float("inf")])
            case 3:
                del model.pieces[draw.randrange(len(model.pieces)) :]
                if not model.pieces:
                    break
            case 4:
                name = draw.choice(["unk_id", "bos_id", "eos_id", "pad_id"])
                setattr(model.trainer_spec, name, draw.choice([-1, 0, 1, 2**31 - 1]))
                model.trainer_spec.model_type = draw.choice([2, 2, 2, 1, 3, 4])
            case _:
                model.normalizer_spec.precompiled_charsmap = draw.randbytes(draw.choice([0, 4, 100]))
                model.normalizer_spec.add_dummy_prefix = draw.random() < 0.5
    return model.SerializeToString()


# Files


class Victim:
    """A run and a Hugging Face folder, and how each of their files is opened."""

    def __init__(self, run: Path, work: Path):
        self.run, self.llama = run, work / "llama"
        if not self.llama.exists():
            export_model(str(run), str(self.llama))
            store_swept(str(self.llama), {"exit_layer": 2, "draft_length": 3, "exits": [1, 2]}, {"x": [1.5]})

    @cached_property
    def files(self) -> dict[str, tuple[Path, Callable[[bytes, random.Random], bytes], Callable[[], object]]]:
        """Return path, change and reader of each file."""
        checkpoint = Path(str(find_checkpoint(str(self.run))))
        step, llama = epath.Path(checkpoint), self.llama
        return {
            "config.json": (llama / "config.json", change_json, self._load),
            "index": (llama / INDEX, change_json, self._load),
            "safetensors": (llama / SINGLE, change_safetensors, self._load),
            **{name: (llama / name, change_json, lambda: self._encode("tokenizer.json")) for name in TOKENIZER_FILES},
            "sentencepiece": (llama / TOKENIZER, change_sentencepiece, lambda: self._encode(TOKENIZER)),
            "decode.json": (llama / SWEPT, change_json, lambda: swept_settings(str(llama), [])),
            "metrics.jsonl": (self.run / "metrics.jsonl", change_lines, lambda: read_metrics(str(self.run))),
            "config": (checkpoint / "config" / "metadata", change_json, lambda: self._signed_config(checkpoint)),
            "checksums": (checkpoint / "checksums" / "metadata", change_json, lambda: load_model(str(self.run))),
            "batches": (next((checkpoint / "batches").iterdir()), change_json, lambda: read_data_positions(step)),
            "model": (checkpoint / "model" / "_METADATA", change_json, lambda: load_model(str(self.run))),
        }

    def _load(self) -> None:
        folder = open_model_folder(str(self.llama))
        folder.check()
        folder.model()

    def _encode(self, name: str) -> None:
        tokenizer = load_tokenizer(str(self.llama / name))
        tokenizer.decode(tokenizer.encode_prompt(TEXT))

    def _signed_config(self, checkpoint: Path) -> None:
        """Read a changed config whose stored digest was changed to match, as in a malicious checkpoint."""
        try:
            digest = json_sha256(json.loads((checkpoint / "config" / "metadata").read_bytes()))
        except (ValueError, RecursionError):
            digest = ""
        file = checkpoint / "checksums" / "metadata"
        original = file.read_bytes()
        file.write_bytes(json.dumps(json.loads(original) | {"config": digest}).encode())
        AUDIT.active = True
        try:
            if read_config(epath.Path(checkpoint)).model != self.config.model:
                load_model(str(self.run))
        finally:
            AUDIT.active = False
            file.write_bytes(original)

    @cached_property
    def config(self) -> Config:
        return read_config(find_checkpoint(str(self.run)))


def split_weights(folder: Path, files: int = 2) -> dict[str, str]:
    """Split model.safetensors into files with an index; return the name of each tensor's file."""
    tensors = load_file(str(folder / SINGLE))
    names = {name: f"model-{number % files + 1:05d}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, str(folder / file))
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


class Audit:
    """Notes in ``found`` where code opens files outside the allowed folders or starts something, while ``active``."""

    def __init__(self) -> None:
        self.active, self.found, self.inside = False, "", ""
        paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent)}
        self._libraries = {*paths, *map(os.path.realpath, paths), "/proc", "/sys", "/dev"}
        sys.addaudithook(self._check)

    def _check(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in EXECUTES:
            self.found = f"{event} {str(arguments)[:200]}"
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = arguments[2] & WRITING
            if writes or not any(Path(path).is_relative_to(folder) for folder in (self.inside, *self._libraries)):
                self.found = f"opens {path}{' for writing' * bool(writes)}"


AUDIT = Audit()


def try_input(victim: Victim, name: str, seed: int) -> tuple[str, bool]:
    """Open one damaged file; return a finding or "", and whether the file was refused."""
    path, change, read = victim.files[name]
    original = path.read_bytes()
    path.write_bytes(change(original, random.Random(f"{name} {seed}")))
    AUDIT.found, AUDIT.inside, AUDIT.active = "", os.path.realpath(victim.run.parent), name != "config"
    try:
        with warnings.catch_warnings(action="ignore"):
            read()
        return AUDIT.found, False
    except UserError:
        return AUDIT.found, True
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {traceback.format_exc(limit=-4)}", False
    finally:
        AUDIT.active = False
        path.write_bytes(original)


# The command


def make_run(folder: Path) -> Path:
    """Train a tiny run for a step; return its folder."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(40):
        (text / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 9)
    data = DataConfig(source="text", path=str(text), tokenizer=str(folder / "t.model"), sequence_length=16)
    vocabulary = train_tokenizer(open_documents(data, "train"), data.tokenizer, 300).vocab_size
    config = Config(
        model=ModelConfig(2, 16, 2, 1, 24, vocabulary, compute_dtype="float32"),
        data=data,
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(str(folder / "run"), steps=1, batch_size=2, evaluate_batches=1, loss_chunk=16),
    )
    train(config)
    return folder / "run"


def try_inputs(run: Path, name: str, seeds: range, deadline: float) -> tuple[int, int]:
    """Try inputs on a copy of ``run``; print the findings, and return how many inputs and how many findings."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    work, findings, refused, done = run.parent / name, 0, 0, 0
    shutil.rmtree(work, ignore_errors=True)  # a process that died may have left a damaged file
    shutil.copytree(run, work / "run")
    victim = Victim(work / "run", work)
    if name == "index":
        split_weights(victim.llama)
    _, _, read = victim.files[name]
    read()  # imports its modules before the audit
    with open(run.parent / CURRENT, "wb") as current:
        for seed in seeds:
            if time.monotonic() > deadline:
                break
            os.pwrite(current.fileno(), f"{seed:20}".encode(), 0)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            finding, was_refused = try_input(victim, name, seed)
            faulthandler.cancel_dump_traceback_later()
            refused, done, findings = refused + was_refused, done + 1, findings + bool(finding)
            if finding:
                print(f"FINDING {name} seed {seed}: {finding}", flush=True)
    print(f"{name}: {done} inputs, {refused} refused, {findings} findings", flush=True)
    return done, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000, help="inputs over all files (default: 50000)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after about this time")
    parser.add_argument("--only", default="", help="one of the files")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)  # of the process that started this one
    args = parser.parse_args()
    if args.run:
        seeds = range(args.seed, args.seed + args.inputs)
        _, found = try_inputs(Path(args.run), args.only, seeds, time.monotonic() + args.seconds)
        sys.exit(FOUND if found else 0)
    found = False
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        names = [args.only] if args.only else list(Victim(run, Path(folder)).files)
        for name in names:
            seed, last = args.seed, args.seed + -(-args.inputs // len(names))
            deadline = time.monotonic() + args.seconds / len(names)
            while seed < last:  # a process of its own, which may crash
                own = {"run": run, "only": name, "seed": seed, "inputs": last - seed}
                own["seconds"] = max(1.0, deadline - time.monotonic())
                options = [f"--{key}={value}" for key, value in own.items()]
                current = run.parent / CURRENT
                current.unlink(missing_ok=True)
                status = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", *options], check=False).returncode
                found |= status != 0
                if status in (0, FOUND):
                    break
                if not current.exists() or not current.read_bytes():
                    raise UserError(f"{name}: the process ended with status {status} before its first input")
                seed = int(current.read_bytes())
                print(f"FINDING {name} seed {seed}: the process ended with status {status}", flush=True)
                seed += 1
    sys.exit(found)


if __name__ == "__main__":
    run_command(main)
