"""API keys: made at random, kept as SHA-256 hashes, compared in constant time.

A keys file has one line per key, `name sha256-hex`; `#` starts a comment. Keys are 32 random bytes, so one pass of
SHA-256 is enough: nobody can try them out. Admin keys lie in a file of their own and open nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steerwell.core.errors import ArgumentError

API_KEY = "STEERWELL_API_KEY"
ADMIN_KEY = "STEERWELL_ADMIN_KEY"
SHORTEST = 20  # characters of a key that a person chose

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[!-~]+")  # what an HTTP header carries unchanged
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """Hashed keys by the name of who holds them; empty (false) means that there are none.

    Attributes:
        hashes: (name, SHA-256 of the key), one entry per key.
    """

    hashes: tuple[tuple[str, bytes], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hashes)

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Keys:
        """Keys given in plain, by name.

        Raises:
            ArgumentError: a key is shorter than `SHORTEST`, or has characters that no HTTP header carries.
        """
        for name, key in values.items():
            _check_name(name)
            if len(key) < SHORTEST or not _KEY.fullmatch(key):
                raise ArgumentError(
                    f"{name}: got a key of {len(key)} characters; expected {SHORTEST} or more printable ASCII "
                    "characters without spaces; take one that 'steerwell keys new NAME' prints, or unset it"
                )
        return cls(tuple((name, _digest(key)) for name, key in values.items()))

    @classmethod
    def from_file(cls, path: str | Path) -> Keys:
        """The keys of a file. Warns where others than its owner can read it or its group can change it.

        Raises:
            ArgumentError: the file cannot be read, holds no key or a wrong line, or names a client twice.
        """
        file = Path(path)
        found = _read(file)
        if os.name == "posix" and file.stat().st_mode & 0o027:
            _log.warning("keys file %s is open to other users; run: chmod 600 %s", file, file)
        if not found:
            raise ArgumentError(f"keys file {file}: holds no key, so nobody could come in; {_make(file)}")
        return cls(tuple(found.items()))

    def name_of(self, presented: str | None) -> str | None:
        """Who holds the presented key; None: nobody, or no key came. Every entry is compared, whichever fits."""
        digest = _digest(presented or "")
        name = None
        for holder, known in self.hashes:
            if hmac.compare_digest(digest, known):
                name = holder
        return name if presented else None


def load_keys(
    file: str | Path | None, admin_file: str | Path | None, environ: Mapping[str, str] = os.environ
) -> tuple[Keys, Keys]:
    """A server's (client keys, admin keys): of the files, and of `STEERWELL_API_KEY` and `STEERWELL_ADMIN_KEY`.

    Raises:
        ArgumentError: as `Keys.from_file` and `Keys.of`; a variable that is set but empty; a key that is in both.
    """
    clients, admins = _gathered(file, API_KEY, environ), _gathered(admin_file, ADMIN_KEY, environ)
    if shared := {digest for _, digest in clients.hashes} & {digest for _, digest in admins.hashes}:
        names = sorted(name for name, digest in (*clients.hashes, *admins.hashes) if digest in shared)
        raise ArgumentError(
            f"keys: {' and '.join(names)} are one key, for clients and for admins; make admins a key of their own"
        )
    return clients, admins


def new_key(name: str) -> tuple[str, str]:
    """A new random key, and the line of a keys file that admits it.

    Raises:
        ArgumentError: the name is not made of 1 to 64 letters, digits, dots, dashes and underscores.
    """
    _check_name(name)
    key = f"sw-{secrets.token_urlsafe(32)}"
    return key, f"{name} {_digest(key).hex()}"


def add_key(name: str, path: str | Path) -> str:
    """Make a key, append its hash to a keys file (made for its owner alone if it is new), and return the key.

    Raises:
        ArgumentError: the name is in the file already or is no name; the file cannot be read or written.
    """
    file = Path(path)
    key, line = new_key(name)
    if file.exists() and name in _read(file):
        raise ArgumentError(f"name: {name!r} is in {file} already; choose another, or remove its line first")
    try:
        with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+", encoding="utf-8") as keys:
            keys.seek(0)
            text = keys.read()
            keys.write(f"{line}\n" if not text or text.endswith("\n") else f"\n{line}\n")
    except OSError as error:
        raise ArgumentError(f"keys file {file} cannot be written: {error.strerror or error}; name another") from error
    return key


def _read(file: Path) -> dict[str, bytes]:
    """Hashes by name."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"keys file {file} cannot be read: {error}; {_make(file)}") from error
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not (_NAME.fullmatch(words[0]) and _HASH.fullmatch(words[1])):
            raise ArgumentError(  # the line itself stays untold: it may hold a key in plain
                f"keys file {file}, line {number}: expected 'name sha256-hex' (64 hex digits); {_make(file)}"
            )
        if words[0] in found:
            raise ArgumentError(f"keys file {file}, line {number}: {words[0]!r} is there already; remove one line")
        found[words[0]] = bytes.fromhex(words[1])
    return found


def _gathered(file: str | Path | None, variable: str, environ: Mapping[str, str]) -> Keys:
    listed = Keys.from_file(file) if file is not None else Keys()
    single = Keys.of({variable: environ[variable]}) if variable in environ else Keys()
    return Keys((*listed.hashes, *single.hashes))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"name: got {name!r}; expected 1 to 64 letters, digits, dots, dashes or underscores")


def _make(file: Path) -> str:
    return f"make keys with: steerwell keys new NAME --file {file}"
