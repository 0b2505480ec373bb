"""Locations: where a cache is, a folder of this machine or the address of objects in a store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "az", "memory")
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SIGNATURE|SAS", re.IGNORECASE)
"""In the names of environment variables that hold what nobody is to read."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """The address of an object, or of all below a prefix; answers to the names that a Path has for its parts.

    Attributes:
        root: scheme and bucket, such as "s3://bucket".
        key: what follows, without a slash at either end.
    """

    root: str
    key: str = ""

    def __truediv__(self, name: str) -> ObjectPath:
        """Return the address of something below it."""
        return ObjectPath(self.root, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        """Show it as a URL."""
        return f"{self.root}/{self.key}" if self.key else self.root

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """What it is directly below."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    def absolute(self) -> ObjectPath:
        """Return what means the same wherever the process is."""
        return self

    @property
    def of_one_process(self) -> bool:
        """Whether other processes have other objects there."""
        return self.root.startswith("memory://")


Location = Path | ObjectPath
"""Where a file or a folder is."""


def located(given: str | Path | ObjectPath) -> Location:
    """Return what a text stands for: a path, or a URL.

    Raises:
        ValueError: it is empty or has a NUL character, or is a URL that cannot be used.
    """
    if isinstance(given, ObjectPath):
        return given
    if not isinstance(given, (str, Path)):
        raise ValueError("name a folder")
    text = str(given)
    if not text.strip() or "\0" in text:
        raise ValueError("a path must not be empty, and has no NUL character")
    if isinstance(given, Path) or "://" not in given:
        return Path(given)
    found = urlsplit(given)
    if "@" in found.netloc or found.query or found.fragment:
        raise ValueError("credentials come from the environment: a URL must have neither '@', '?' nor '#'")
    if found.scheme == "file" and found.netloc in {"", "localhost"}:
        return Path(unquote(found.path))
    if found.scheme not in SCHEMES or not found.netloc:
        raise ValueError(f"a URL must be {', '.join(f'{scheme}://bucket/…' for scheme in SCHEMES)} or file:///…")
    parts = [part for part in unquote(found.path).split("/") if part]
    if {".", ".."} & {*parts}:
        raise ValueError("a URL must have neither '.' nor '..' among its parts")
    return ObjectPath(f"{found.scheme}://{found.netloc}", "/".join(parts))


def without_secrets(text: str) -> str:
    """Return a text without what in it may be credentials: of URLs, and of the environment."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1…@", text)
    text = re.sub(r"(\w+://[^\s?\"')]*)\?[^\s\"')]*", r"\1?…", text)
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 4:
            text = text.replace(value, "…")
    return text
