"""Who may ask: API keys, the adapters each tenant may use, its quotas, and the file that says so.

The file holds SHA-256 hashes, never keys. A key is 256 random bits, so that a plain hash is enough (there is nothing to
guess, and a slow hash would be paid at every request); `lorakit keys` makes keys, and no key can be chosen.

    admin: ["sha256:…"]
    tenants:
      - {name: acme, keys: ["sha256:…"], adapters: [sql, "law-*"], requests_per_minute: 600, tokens_per_minute: 100000,
         concurrent: 16, weight: 2}

A file that changes is read again while serving; one that cannot be read leaves everything as it was.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from lorakit.errors import LorakitError, unknown
from lorakit.files.folder import Stamp, stamp_of, write_whole
from lorakit.reading import KINDS, read_text
from lorakit.serve.http.faults import Fault, later

log = logging.getLogger("lorakit.serve")

PREFIX = "lk-"


def make_key() -> str:
    """A new key, to be shown once."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What the file keeps of a key."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _hash(text: str) -> str:
    if not text.startswith("sha256:") or len(text) != len(digest("")):
        raise ValueError(
            "holds a text that is not a hash. The file keeps sha256:… of a key, never a key; `lorakit keys` makes a key and "
            "writes its hash"
        )
    return text


def _listed(value: Any) -> Any:
    """One text as a list of one, a list as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Hashes = Annotated[tuple[Annotated[str, AfterValidator(_hash)], ...], BeforeValidator(_listed)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Tenant:
    """One customer.

    Attributes:
        name: for logs, metrics and fairness.
        keys: hashes of its keys.
        adapters: names it may use, with `*` and `?`.
        base: whether it may use the base model alone.
        requests_per_minute: 0 is no limit.
        tokens_per_minute: of prompts and answers together; 0 is no limit.
        concurrent: answers at once; 0 is no limit.
        weight: its share of the machine under load.
        cache: whose computed beginnings of prompts it may find: its "own", or those of all tenants that say "shared". Who
            shares can learn from the time to a first token what others have asked.
        default: the adapter that requests get who call the model "default".
        admin: may use the admin endpoints.
    """

    name: Annotated[str, Field(min_length=1)]
    keys: Hashes = ()
    adapters: Texts = ("*",)
    base: bool = True
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    concurrent: Count = 0
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    cache: Literal["own", "shared"] = "own"
    default: str = ""
    admin: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether an adapter is this tenant's to use."""
        return any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYONE = Tenant("anyone", admin=True)
"""Who asks where there are no keys."""


# -- quotas ------------------------------------------------------------------------------------------------------------------


class Bucket:
    """A quota per minute: full at the start, filled evenly, and allowed into debt for what is known only afterwards."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self.level, self.when = per_minute, float(per_minute), now

    def refill(self, now: float) -> None:
        """Bring the level to now."""
        self.level = min(float(self.per_minute), self.level + (now - self.when) * self.per_minute / 60)
        self.when = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; more than a minute's worth needs a full bucket. 0: it is there."""
        self.refill(now)
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)


def _exceeded(text: str, seconds: float) -> Fault:
    return Fault(429, text, "quota_exceeded", headers=later(seconds))


class Ledger:
    """What one tenant has used. It outlives a reload of the file."""

    def __init__(self) -> None:
        self.running = 0
        self.used: Counter[str] = Counter()
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def enter(self, tenant: Tenant, answers: int, tokens: int, now: float) -> None:
        """Count a request that begins, with the tokens of its prompts and what is set aside for its answers; or raise the Fault
        that says which quota it exceeds and when to try again."""
        asked = {"requests_per_minute": 1, "tokens_per_minute": tokens}
        with self._lock:
            most = tenant.concurrent
            if most and answers > most:
                text = f"{answers} answers were asked for at once; this key may have {most}."
                raise Fault(400, text, "quota_exceeded", "n")
            if most and self.running + answers > most:
                raise _exceeded(
                    f"{self.running} answers are being made for this key, and {answers} more were asked for; {most} at once is "
                    "its limit.",
                    1,
                )
            for name, amount in asked.items():
                bucket = self._bucket(tenant, name, now)
                if bucket is not None and (wait := bucket.wait(amount, now)) > 0:
                    limit = f"{bucket.per_minute} {name.replace('_', ' ')}"
                    raise _exceeded(f"this key's limit of {limit} is used up for {wait:.0f} s.", wait)
            for name, amount in asked.items():
                self._take(tenant, name, amount, now)
            self.running += answers

    def leave(self, tenant: Tenant, answers: int, further: int, now: float) -> None:
        """Settle a request that has ended in whatever way: the tokens that it generated beyond those set aside, which are given
        back where it generated fewer."""
        with self._lock:
            self.running -= answers
            self._take(tenant, "tokens_per_minute", further, now)

    def _bucket(self, tenant: Tenant, name: str, now: float) -> Bucket | None:
        limit: int = getattr(tenant, name)
        if not limit:
            self._buckets.pop(name, None)
            return None
        bucket = self._buckets.get(name)
        if bucket is None or bucket.per_minute != limit:
            bucket = self._buckets[name] = Bucket(limit, now)
        return bucket

    def _take(self, tenant: Tenant, name: str, amount: float, now: float) -> None:
        bucket = self._bucket(tenant, name, now)
        if bucket is not None:
            bucket.refill(now)
            bucket.level = min(bucket.level - amount, float(bucket.per_minute))


# -- the file ----------------------------------------------------------------------------------------------------------------


class Tenants:
    """All tenants, and who a key belongs to.

    Args:
        file: YAML or JSON; None serves anyone.
        clock: seconds, for quotas.
    """

    LOOKS = 1.0
    """Seconds between two looks at the file."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.tenants: dict[str, Tenant] = {} if file else {ANYONE.name: ANYONE}
        self._hashes: list[tuple[bytes, Tenant]] = []
        self._ledgers: dict[str, Ledger] = {}
        self._stamp: Stamp = ()
        self._looked = clock()
        if file is not None:
            self.reload()

    @property
    def open(self) -> bool:
        """Whether anyone may ask without a key."""
        return self.file is None

    def reload(self) -> list[str]:
        """Read the file again, whole or not at all; returns the tenants' names.

        Raises:
            LorakitError: it cannot be read; everything is as it was.
        """
        if self.file is None:
            return list(self.tenants)
        stamp = stamp_of(self.file)
        tenants = read_tenants(self.file)
        self._hashes = [(key.encode(), tenant) for tenant in tenants.values() for key in tenant.keys]
        self.tenants, self._stamp = tenants, stamp
        return list(tenants)

    def without_path(self, text: str) -> str:
        """A message for others than the operator: the file by its name alone."""
        return text if self.file is None else text.replace(str(self.file), self.file.name)

    def find(self, key: str | None) -> Tenant | None:
        """The tenant of a key, or None. Takes the same time whichever key it is, right or wrong."""
        self._look()
        if self.open:
            return ANYONE
        presented = digest(key or "").encode()
        found = None
        for known, tenant in self._hashes:
            if hmac.compare_digest(known, presented):
                found = tenant
        return found if key else None

    def ledger(self, tenant: Tenant) -> Ledger:
        """What this tenant has used."""
        return self._ledgers.setdefault(tenant.name, Ledger())

    def _look(self) -> None:
        """Read the file again where it has changed, looking at most once a second."""
        now = self.clock()
        if self.file is None or now - self._looked < self.LOOKS:
            return
        self._looked = now
        stamp = stamp_of(self.file)
        if stamp != self._stamp:
            try:
                self.reload()
                log.info("keys: %s read again, %d tenants", self.file, len(self.tenants))
            except LorakitError as problem:
                self._stamp = stamp  # said once, not every second
                log.error("%s The keys from before stay in force.", problem)


KNOWN = [one.name for one in fields(Tenant) if one.name != "admin"]
"""What the file may say of a tenant."""


def read_tenants(file: Path) -> dict[str, Tenant]:
    """The tenants of a file by name, the admin among them.

    Raises:
        LorakitError: it is not there, is no YAML, or holds something that is not understood.
    """
    data = _read(file)
    for name in data:
        if name not in ("admin", "tenants"):
            raise unknown("entry", str(name), ["admin", "tenants"], str(file))
    listed = data.get("tenants") or []
    if not isinstance(listed, list):
        raise LorakitError(f"keys: tenants in {file} is a {type(listed).__name__}; it is a list of tenants.")
    found = [_tenant({"name": "admin", "keys": data["admin"]}, file, admin=True)] if data.get("admin") else []
    tenants: dict[str, Tenant] = {}
    owners: dict[str, str] = {}
    for tenant in [*found, *(_tenant(entry, file) for entry in listed)]:
        if tenant.name in tenants:
            raise LorakitError(f'keys: {file} has two tenants named "{tenant.name}".')
        tenants[tenant.name] = tenant
        for key in tenant.keys:
            if (owner := owners.setdefault(key, tenant.name)) != tenant.name:
                raise LorakitError(f'keys: in {file} "{owner}" and "{tenant.name}" have the same key.')
    return tenants


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise LorakitError(f"keys: there is no file {file}. `lorakit keys {file} --admin` makes one.")
    try:
        data = yaml.safe_load(read_text(file, "keys"))
    except yaml.YAMLError as problem:
        raise LorakitError(f"keys: {file} is not YAML ({' '.join(str(problem).split())}).") from problem
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise LorakitError(f"keys: {file} holds {KINDS[type(data)]}; it is an object with admin and tenants.")
    return data


def _tenant(entry: Any, file: Path, admin: bool = False) -> Tenant:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise LorakitError(f"keys: a tenant in {file} has no name: {entry!r}.")
    where = f'tenant "{entry["name"]}" in {file}'
    for name in entry:
        if name not in KNOWN:
            raise unknown("entry", str(name), KNOWN, where)
    try:
        return Tenant(**entry, admin=admin)
    except ValidationError as problem:
        first = problem.errors()[0]
        name = first["loc"][0]
        if name == "keys":  # which may be keys, by mistake: not shown
            said = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else "is not a list of texts"
        else:
            said = f"is {entry[name]!r}; {_WANTED.get(first['type'], first['msg'].replace('Input', 'it'))}"
        raise LorakitError(f"keys: {name} of {where} {said}.") from None


_WANTED = {
    "bool_type": "it is true or false",
    "tuple_type": "it is a list of texts",
    "string_type": "it is a list of texts",
}
"""Where pydantic's own words speak of Python."""


def add_key(file: Path, tenant: Tenant) -> str:
    """Make a key for a tenant (or for the admin), write its hash into the file, and return the key.

    A tenant that is there gets one key more and keeps the rest of what the file says of it.

    Raises:
        LorakitError: the file is not understood, and so not written over.
    """
    data = _read(file) if file.exists() else {}
    if file.exists():
        read_tenants(file)
    key = make_key()
    if tenant.admin:
        data["admin"] = [*_listed(data.get("admin") or []), digest(key)]
    else:
        entries = data["tenants"] = data.get("tenants") or []
        entry = next((one for one in entries if one["name"] == tenant.name), None)
        if entry is None:
            given = {one.name: getattr(tenant, one.name) for one in fields(Tenant) if one.name in KNOWN}
            entry = {name: value for name, value in given.items() if name == "name" or value != getattr(ANYONE, name)}
            entry = {name: list(value) if isinstance(value, tuple) else value for name, value in entry.items()}
            entries.append(entry)
        entry["keys"] = [*_listed(entry.get("keys") or []), digest(key)]
    write = json.dumps(data, indent=2) if file.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
    write_whole(file, write.encode(), mode=0o600)  # a server that reads it meanwhile sees the old or the new
    return key
