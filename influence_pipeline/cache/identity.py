"""Identities: what changes a stage's arrays and nothing else, and the keys that are hashes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Identity = Mapping[str, Any]
KEY_LENGTH = 12


def key_of(identity: Identity) -> str:
    """Return the key of an identity: the start of the SHA-256 of its canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def differences(wanted: Identity, cached: Identity) -> tuple[str, ...]:
    """Return the entries in which two identities differ, "name: cached ≠ wanted", dotted where nested."""
    here, there = dict(_flat(wanted)), dict(_flat(cached))
    return tuple(
        f"{name}: {_show(there.get(name))} ≠ {_show(here.get(name))}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    )


def nearest(wanted: Identity, cached: Iterable[Identity]) -> tuple[str, ...]:
    """Return the differences from that cached identity which has the fewest; empty where nothing is cached."""
    return min((differences(wanted, other) for other in cached), key=len, default=())


def told_apart(identities: Sequence[Identity]) -> list[str]:
    """Return, for each of some identities, the entries in which not all are the same, "name = value"."""
    flat = [dict(_flat(identity)) for identity in identities]
    names = sorted({name for entries in flat for name in entries})
    differing = [name for name in names if any(entries.get(name) != flat[0].get(name) for entries in flat)]
    return [", ".join(f"{name} = {_show(found[name])}" for name in differing if name in found) for found in flat]


def _flat(identity: Identity, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _show(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
