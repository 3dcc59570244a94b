"""What a Redis URL says: which servers, of what kind, who we are there, and how TLS is checked. Pure.

    redis://[user:password@]host[:port][/db]
    unix://[user:password@]/path/of/socket[?db=0]
    redis+sentinel://[user:password@]host[:port],host[:port]/service[/db]
    redis+cluster://[user:password@]host[:port],host[:port]

`rediss` in place of `redis` means TLS. Options follow a `?`, spelled as redis-py spells them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from kvindex.errors import ConfigError

# The host is not repeated: a password with a / or @ in it may be taken for one.
_NO_HOST = "expected host:port behind the //; percent-encode special characters of a password"
FORMS = "redis://, rediss:// (TLS), unix://, redis+sentinel://, redis+cluster://"

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = frozenset({*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname"})
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})


class Topology(enum.StrEnum):
    """How the servers behind a URL belong together."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Login(msgspec.Struct, frozen=True):
    """Who we are to a server; the password is shown nowhere."""

    username: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        """Return the name alone."""
        return f"Login({self.username!r})"


class Tls(msgspec.Struct, frozen=True):
    """How a server proves who it is, and we to it. Without a CA file, the system's are trusted."""

    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_cert_reqs: Literal["required", "none"] = "required"
    ssl_check_hostname: bool = True


class RedisUrl(msgspec.Struct, frozen=True):
    """A parsed URL. As a string it is what may be shown: where, but never a password."""

    topology: Topology
    nodes: tuple[tuple[str, int], ...] = ()
    """Host and port of the server, of the Sentinels, or of some nodes of the cluster."""
    socket_path: str | None = None
    db: int = 0
    login: Login = Login()
    tls: Tls | None = None
    service: str | None = None
    """The name under which the Sentinels know the master."""
    sentinel_login: Login = Login()

    def __str__(self) -> str:
        """Return where it leads."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        match self.topology:
            case Topology.SINGLE:
                return self.socket_path or hosts
            case Topology.SENTINEL:
                return f"{self.service} of Sentinel {hosts}"
            case Topology.CLUSTER:
                return f"cluster {hosts}"


def parse_redis_url(url: str) -> RedisUrl:
    """Return what `url` says.

    Raises:
        ConfigError: the URL is not one of ours; the message repeats nothing that could be a password.
    """
    if "://" not in url:
        raise ConfigError(f"redis_url: begin with one of {FORMS}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(f"redis_url: {_NO_HOST}") from None
    try:
        return _parse(parts)
    except ValueError as error:
        raise ConfigError(f"redis_url: {error}") from None


def _parse(parts: SplitResult) -> RedisUrl:
    if parts.fragment:
        raise ValueError("write a # that belongs to a password as %23")
    scheme = parts.scheme
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    login = Login(unquote(username) or None, unquote(password) or None)
    options = _options(parts.query)
    names = [unquote(name) for name in parts.path.split("/")[1:] if name]
    tls = None
    if scheme.startswith("rediss"):
        tls = _tls({name: options.pop(name) for name in _TLS_OPTIONS & options.keys()})
    match scheme.replace("rediss", "redis", 1):
        case "unix":
            if hosts or not names:
                raise ValueError("write the socket's path as unix:///path/of/socket")
            db = _db(options.pop("db", "0"))
            _none_left(options, {"db"})
            path = unquote(parts.path)
            return RedisUrl(Topology.SINGLE, socket_path=path, db=db, login=login)
        case "redis":
            nodes = _nodes(hosts, 6379)
            if len(nodes) > 1:
                raise ValueError("several hosts need redis+sentinel:// or redis+cluster://")
            if len(names) > 1:
                raise ValueError("write one number, the database, behind the host")
            _none_left(options, _TLS_OPTIONS)
            db = _db(names[0] if names else "0")
            return RedisUrl(Topology.SINGLE, nodes, db=db, login=login, tls=tls)
        case "redis+sentinel":
            nodes = _nodes(hosts, 26379)
            if not 1 <= len(names) <= 2:
                raise ValueError("name the service behind the Sentinels: host:port,host:port/service")
            own = {name.removeprefix("sentinel_"): options.pop(name, None) for name in _SENTINEL_OPTIONS}
            _none_left(options, _SENTINEL_OPTIONS | _TLS_OPTIONS)
            return RedisUrl(
                Topology.SENTINEL,
                nodes,
                db=_db(names[1] if len(names) > 1 else "0"),
                login=login,
                tls=tls,
                service=names[0],
                sentinel_login=Login(**own),
            )
        case "redis+cluster":
            nodes = _nodes(hosts, 6379)
            if names not in ([], ["0"]):
                raise ValueError("a cluster has no databases: write nothing behind the hosts")
            _none_left(options, _TLS_OPTIONS)
            return RedisUrl(Topology.CLUSTER, nodes, login=login, tls=tls)
        case _:
            raise ValueError(f"scheme {scheme!r} is unknown; begin with one of {FORMS}")


def _nodes(hosts: str, default_port: int) -> tuple[tuple[str, int], ...]:
    nodes = []
    for each in hosts.split(","):
        found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", each)
        if not found or int(found[3] or 0) > 65535:
            raise ValueError(_NO_HOST)
        nodes.append((found[1] or found[2], int(found[3] or default_port)))
    return tuple(nodes)


def _db(number: str) -> int:
    if not number.isascii() or not number.isdecimal():
        raise ValueError("the database is not a number")
    return int(number)


def _options(query: str) -> dict[str, str]:
    return dict(parse_qsl(query, keep_blank_values=True))


def _none_left(options: Mapping[str, str], known: set[str] | frozenset[str]) -> None:
    for name in options:
        shown = f" {name}" if re.fullmatch(r"[a-z_]{1,40}", name) else ""
        hint = "use rediss with it" if name in _TLS_OPTIONS else f"known here are {', '.join(sorted(known))}"
        raise ValueError(f"unknown option{shown}; {hint}")


def _tls(options: Mapping[str, str]) -> Tls:
    for name in _TLS_FILES:
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"{name}: there is no file {options[name]}")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("ssl_keyfile needs ssl_certfile beside it")
    requirement = options.get("ssl_cert_reqs", "required")
    if requirement not in ("required", "none"):
        raise ValueError("ssl_cert_reqs is required or none")
    checks = {"yes": True, "true": True, "no": False, "false": False}
    check = options.get("ssl_check_hostname", "yes" if requirement == "required" else "no").lower()
    if check not in checks:
        raise ValueError("ssl_check_hostname is yes or no")
    files = {name: options[name] for name in _TLS_FILES if name in options}
    return Tls(
        **files,
        ssl_cert_reqs="required" if requirement == "required" else "none",
        ssl_check_hostname=checks[check],
    )
