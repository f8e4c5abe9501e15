"""Identify a corpus, describe its splits, and decide how a run resumes when the corpus or its settings have changed."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from layerskip_jax.config import Config, DataConfig
from layerskip_jax.data.corpus_files import HELD_OUT_PERCENT
from layerskip_jax.data.documents import Documents, MixedDocuments, documents_digest
from layerskip_jax.data.pipeline import count_sequences, packing_sizes
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.mixture import mixture_shares

DOCUMENTS = ("source", "name", "path", "data_dir", "text_key", "prompt_key", "train_split")
"""Settings that decide which documents a split has."""


class Corpus(NamedTuple):
    """Identifies the documents that a data position counts; checkpoints store it."""

    training: str
    """Digest of the documents to train on (`documents_digest`)."""
    held_out: str
    """Digest of the documents to evaluate on."""
    sequences: int
    """Estimated number of sequences that the training documents fill, at most what shuffling and packing can use
    (`count_sequences`)."""
    components: dict[str, "Corpus"] = {}  # noqa: RUF012 (not changed)
    """The `Corpus` of each component of ``data.mixture``, by name. The digests of a mixture are digests of theirs, and
    its ``sequences`` is their sum."""


def identify_corpus(
    config: Config, tokenizer: Tokenizer, training: Documents, held_out: Documents
) -> tuple[Corpus, list[str]]:
    """Return the `Corpus` that identifies both splits, and lines to print.

    The lines tell the shares of a mixture, what is held out, and whether the corpus is too small to fill
    ``data.shuffle_window``.
    """
    if isinstance(training, MixedDocuments) and isinstance(held_out, MixedDocuments):
        return _identify_mixture(config, tokenizer, training, held_out)
    sequences = count_sequences(config, tokenizer, training, config.train.batch_size)
    lines, window = describe_splits(config.data, training, held_out), config.data.shuffle_window
    if window >= 2 * config.train.batch_size and sequences < window:
        lines.append(
            f"the corpus fills about {sequences:,} sequences of {config.data.sequence_length} tokens, so these are "
            f"shuffled together, not {window:,} (data.shuffle_window)"
        )
    return Corpus(documents_digest(training), documents_digest(held_out), sequences), lines


def _identify_mixture(
    config: Config, tokenizer: Tokenizer, training: MixedDocuments, held_out: MixedDocuments
) -> tuple[Corpus, list[str]]:
    components: dict[str, Corpus] = {}
    lines = [f"rows: {', '.join(f'{share:.1%} {name}' for name, share in training.shares.items())} (data.mixture)"]
    for name, data in config.data.components.items():
        alone = dataclasses.replace(config, data=data)
        components[name], found = identify_corpus(alone, tokenizer, training.parts[name], held_out.parts[name])
        lines += [f"{name}: {line}" for line in found]
    parts = components.values()
    training_digest = _digest(part.training for part in parts)
    held_out_digest = _digest(part.held_out for part in parts)
    return Corpus(training_digest, held_out_digest, sum(part.sequences for part in parts), components), lines


def _digest(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def describe_splits(config: DataConfig, training: Any, held_out: Any) -> list[str]:
    """Return a line about what is held out of a corpus of text or JSON lines, with a warning outside 1 to 20 %."""
    if config.mixture:
        found = ((data, training.parts[name], held_out.parts[name]) for name, data in config.components.items())
        return [line for component in found for line in describe_splits(*component)]
    if config.source not in ("text", "jsonl"):
        return []
    names, left_out = held_out.files.names, held_out.files.left_out
    parts = [training, held_out] if names else [held_out]
    files, cut = sum(len(part.files.files) for part in parts), sum(part.cut for part in parts)
    sizes = [int(np.sum(training.sizes)), int(np.sum(held_out.sizes))]
    percent = 100 * sizes[1] / max(1, sum(sizes))
    line = (
        f"{config.path}: {_count(files, 'file')}{f', {cut} of them cut' * bool(cut)}: "
        f"{_count(len(training) + len(held_out), 'document')}; held out: {f'{_list(names)}, ' * bool(names)}"
        f"{_count(len(held_out), 'document')}, {percent:.1f} % of the text"
        f"{f'; left out: {_list(left_out)}' * bool(left_out)}"
    )
    least, most = HELD_OUT_PERCENT
    if not least <= percent <= most:
        advice = "" if names else ": name files train and validation to choose"
        line = f"WARNING: {line}; that is {'little' if percent < least else 'much'}{advice}"
    return [line.encode(errors="backslashreplace").decode()]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


ResumeFrom = Literal["same rows", "next documents", "first document"]
"""Where a resumed run starts to read: the stored position, the documents after it, or the start of the corpus."""


def resume_mixture(
    saved: Config, config: Config, before: Corpus | None, now: Corpus | None
) -> tuple[dict[str, tuple[str, ResumeFrom]], list[str]]:
    """Match the components of this run with those of the checkpoint.

    Returns ``{name: (stored name, ResumeFrom)}``, and lines about all changes. A component continues the stored one
    that has the same training documents; if several have, the one of its own name. If none has, it takes the stored
    component of its name, and starts over because the documents have changed. An older checkpoint has no `Corpus`: its
    component of the same name is taken to be the same. A component without a match is not in the result. A corpus
    without a mixture is the component ``""``, so it keeps its position when it joins or leaves a mixture.
    """
    old = before.components or {"": before} if before else dict.fromkeys(saved.data.components)
    new = now.components or {"": now} if now else dict.fromkeys(config.data.components)
    resumed: dict[str, tuple[str, ResumeFrom]] = {}
    effects: dict[str, list[str]] = {}
    for name, corpus in new.items():
        source = _continued(old, name, corpus)
        if source is None:
            what = "new in the mixture" if name else "the corpus is new"
            effects.setdefault(f"{what}, read from the first document on", []).append(name)
            continue
        was = dataclasses.replace(saved, data=saved.data.components[source])
        becomes = dataclasses.replace(config, data=config.data.components[name])
        resume_from, notes = resume_data(was, becomes, old[source], corpus)
        resumed[name] = source, resume_from
        for note in notes:
            effects.setdefault(note, []).append(name)
    lines = [
        note if names == [""] or names == list(new) == list(resumed) else f"{_list(names)}: {note}"
        for note, names in effects.items()
    ]
    read_on = {source for source, _ in resumed.values()}
    lines += [f"{name or 'the former corpus'}: no longer read" for name in old if name not in read_on]
    shares, new_shares = mixture_shares(saved.data.mixture), mixture_shares(config.data.mixture)
    kept = len(resumed) == len(new) == len(old)
    if not kept or any(not math.isclose(new_shares[name], shares[resumed[name][0]]) for name in new):
        lines.append(
            "data.mixture: the rows follow the new shares from here on; overall held-out losses do not compare with "
            "earlier ones"
        )
    return resumed, lines


def _continued(old: Mapping[str, Corpus | None], name: str, corpus: Corpus | None) -> str | None:
    same = [source for source, stored in old.items() if corpus and stored and stored.training == corpus.training]
    if name in old and (name in same or not same):
        return name
    return same[0] if same else None


def resume_data(
    saved: Config, config: Config, before: Corpus | None, now: Corpus | None
) -> tuple[ResumeFrom, list[str]]:
    """Return where a run with ``config`` resumes reading after a checkpoint, and a note about each changed setting.

    ``before`` and ``now`` are the corpus of the checkpoint, None if it is older than `Corpus`, and that of the run.
    """
    effects: list[tuple[list[str], str]] = []

    def changed(*names: str, group: str = "data") -> list[str]:
        old, new = getattr(saved, group), getattr(config, group)
        return [f"{group}.{name}" for name in names if getattr(old, name) != getattr(new, name)]

    documents, rows = changed(*DOCUMENTS), changed("batch_size", group="train") + changed("sequence_length")
    sizes = [
        packing_sizes(settings, settings.train.batch_size, corpus.sequences if corpus else settings.data.shuffle_window)
        for settings, corpus in ((saved, before), (config, now))
    ]
    resume_from: ResumeFrom = "next documents" if rows or sizes[0] != sizes[1] else "same rows"
    if before is None or now is None:
        if changed("source", "name", "train_split", "prompt_key"):
            resume_from = "next documents"
        effects.append(
            (documents or ["data"], "this checkpoint stores no digest of its corpus, which is taken to be the same")
        )
    elif before.training != now.training:
        resume_from = "first document"
        effects.append(
            (documents or ["the corpus has changed"], "other training documents, read from the first one on")
        )
    else:
        effects.append((documents, "the same training documents"))
    if resume_from != "first document" and (seed := changed("seed", group="train")):
        resume_from = "first document"
        effects.append((seed, "another order of the training documents, read from the first one on"))
    order = rows + changed("shuffle_window")
    if resume_from == "next documents":
        effect = (
            "every row continues after the documents that were read; those in its buffers may be skipped or read twice"
        )
        effects.append((order or documents or ["the shuffle window"], effect))
    elif resume_from == "same rows":
        effects.append((order, "the order of the data stays the same"))
    if before and now:
        same = before.held_out == now.held_out
        names = changed("validation_split") or ([] if same else documents or ["the corpus has changed"])
        effects.append(
            (
                names,
                "the same held-out documents"
                if same
                else "other held-out documents: their losses do not compare with earlier ones",
            )
        )
    effects.append((changed("sequence_length", "cross_document_attention"), "losses do not compare with earlier ones"))
    effects.append((changed("workers"), "the order of the data stays the same"))
    effects.append((changed("tokenizer"), "the same tokenizer"))
    return resume_from, [f"{', '.join(names)}: {effect}" for names, effect in effects if names]
