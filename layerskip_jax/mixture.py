"""The setting ``data.mixture``: its words name corpora and their weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from layerskip_jax.checks import require
from layerskip_jax.errors import UserError, nearest

LOCATIONS = {"python_stdlib": "", "tfds": "name", "text": "path", "jsonl": "path", "tokens": "path"}
"""For each source, the field of `layerskip_jax.config.DataConfig` that locates its corpus."""

FORM = "data.mixture takes WEIGHT=SOURCE:PLACE for each corpus, such as 0.7=text:my_texts 0.3=tfds:lm1b"


class Component(NamedTuple):
    """One corpus of a mixture."""

    weight: float
    settings: dict[str, str]
    """``source``, and ``name`` or ``path``, of `layerskip_jax.config.DataConfig`."""


def parse_mixture(words: Sequence[str]) -> dict[str, Component]:
    """Return the components by their names ``SOURCE:PLACE``; raises `UserError` for anything else.

    >>> parse_mixture(["0.7=text:my_texts", "3=python_stdlib"])["text:my_texts"]
    Component(weight=0.7, settings={'source': 'text', 'path': 'my_texts'})
    """
    components: dict[str, Component] = {}
    for word in words:
        weight, equals, name = word.partition("=")
        source, _, place = name.partition(":")
        require(bool(equals and name), f"{FORM}; not {word!r}")
        require(source in LOCATIONS, f"data.mixture {word}: no source {source!r}{nearest(source, LOCATIONS)}; {FORM}")
        location = LOCATIONS[source]
        require(
            bool(place) == bool(location),
            f"data.mixture {word}: {source} needs its data.{location} after a colon"
            if location
            else f"data.mixture {word}: {source} has no place to name: write {weight}={source}",
        )
        require(name not in components, f"data.mixture has {name} twice: name it once, with the sum of its weights")
        components[name] = Component(
            _weight(weight, word), {"source": source} | ({location: place} if location else {})
        )
    lightest = min((component.weight for component in components.values()), default=1.0)
    total = sum(component.weight for component in components.values())
    least = "data.mixture must give every corpus a weight of at least 1e-6 of their sum"
    require(math.isfinite(total) and total <= 1e6 * lightest, f"{least}, which must be finite")
    return components


def _weight(text: str, word: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"data.mixture {word}: the weight {text!r} is not a number; {FORM}") from None
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"data.mixture {word}: a weight must be finite and more than 0: leave out a corpus that should not be read"
        )
    return weight


def mixture_shares(words: Sequence[str]) -> dict[str, float]:
    """Return the share of the rows of every component, by its name; ``{"": 1.0}`` without a mixture."""
    weights = {name: component.weight for name, component in parse_mixture(words).items()} or {"": 1.0}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
