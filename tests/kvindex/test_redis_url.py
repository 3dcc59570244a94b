"""What a Redis URL says, and that a wrong one is refused without a word of its password."""

import pytest

from kvindex.errors import ConfigError
from kvindex.redis_url import Login, RedisUrl, Tls, Topology, parse_redis_url

HERE = ("127.0.0.1", 6379)


@pytest.mark.parametrize(
    ("url", "expected", "shown"),
    [
        ("redis://127.0.0.1", RedisUrl(Topology.SINGLE, (HERE,)), "127.0.0.1:6379"),
        ("redis://h:1/3", RedisUrl(Topology.SINGLE, (("h", 1),), db=3), "h:1"),
        (
            "redis://user:p%40ss%2F%3A@h",
            RedisUrl(Topology.SINGLE, (("h", 6379),), login=Login("user", "p@ss/:")),
            "h:6379",
        ),
        ("redis://:pass@h", RedisUrl(Topology.SINGLE, (("h", 6379),), login=Login(None, "pass")), "h:6379"),
        ("redis://[::1]:7", RedisUrl(Topology.SINGLE, (("::1", 7),)), "[::1]:7"),
        ("rediss://h", RedisUrl(Topology.SINGLE, (("h", 6379),), tls=Tls()), "h:6379"),
        (
            "rediss://h?ssl_cert_reqs=none",
            RedisUrl(
                Topology.SINGLE,
                (("h", 6379),),
                tls=Tls(ssl_cert_reqs="none", ssl_check_hostname=False),
            ),
            "h:6379",
        ),
        (
            "unix://user:pass@/run/redis.sock?db=2",
            RedisUrl(Topology.SINGLE, socket_path="/run/redis.sock", db=2, login=Login("user", "pass")),
            "/run/redis.sock",
        ),
        (
            "redis+sentinel://user:pass@a,b:2/kv/4?sentinel_username=s&sentinel_password=t",
            RedisUrl(
                Topology.SENTINEL,
                (("a", 26379), ("b", 2)),
                db=4,
                login=Login("user", "pass"),
                service="kv",
                sentinel_login=Login("s", "t"),
            ),
            "kv of Sentinel a:26379,b:2",
        ),
        (
            "rediss+cluster://user:pass@a:1,b",
            RedisUrl(Topology.CLUSTER, (("a", 1), ("b", 6379)), login=Login("user", "pass"), tls=Tls()),
            "cluster a:1,b:6379",
        ),
    ],
)
def test_every_form(url, expected, shown):
    parsed = parse_redis_url(url)
    assert (parsed, str(parsed)) == (expected, shown)


def test_tls_files(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).touch()
    query = f"ssl_ca_certs={tmp_path}/ca&ssl_certfile={tmp_path}/cert&ssl_keyfile={tmp_path}/key"
    parsed = parse_redis_url(f"rediss+sentinel://h/kv?{query}&ssl_check_hostname=no")
    assert parsed.tls == Tls(
        ssl_ca_certs=f"{tmp_path}/ca",
        ssl_certfile=f"{tmp_path}/cert",
        ssl_keyfile=f"{tmp_path}/key",
        ssl_check_hostname=False,
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1", "scheme 'http' is unknown"),
        ("redis+sentnel://h/s", r"scheme 'redis\+sentnel' is unknown"),
        ("127.0.0.1:6379", "begin with one of redis://"),
        ("user:s3cret@h", "begin with one of redis://"),
        ("redis://", "expected host:port"),
        ("redis://h:x", "expected host:port"),
        ("redis://h:99999", "expected host:port"),
        ("redis://user:s3cret/x@h:1", "percent-encode special characters"),
        ("redis://user:1/s3cret@h:1", "the database is not a number"),
        ("redis://user:1?s3cret@h:1", "unknown option; known here are"),
        ("redis://user:1#s3cret@h:1", "%23"),
        ("redis://[h:1", "expected host:port"),
        ("redis://user:s3cret\u2100@h:1", "expected host:port"),
        ("redis://a,b", r"several hosts need redis\+sentinel"),
        ("redis://h/zero", "the database is not a number"),
        ("redis://h/0/1", "one number"),
        ("redis://h?timeout=3", "unknown option timeout; known here are ssl_ca_certs"),
        ("redis://h?ssl_ca_certs=/x", "unknown option ssl_ca_certs; use rediss with it"),
        ("rediss://h?ssl_ca_certs=/nowhere/ca", "there is no file /nowhere/ca"),
        ("rediss://h?ssl_keyfile=/dev/null", "there is no file /dev/null"),
        ("rediss://h?ssl_cert_reqs=maybe", "required or none"),
        ("rediss://h?ssl_check_hostname=maybe", "yes or no"),
        ("unix://h/run/redis.sock", "unix:///path"),
        ("unix://", "unix:///path"),
        ("redis+sentinel://a,b", "name the service"),
        ("redis+cluster://a,b/2", "a cluster has no databases"),
    ],
)
def test_a_wrong_url_is_one_line_without_secrets(url, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_redis_url(url)
    line = str(caught.value)
    assert line.startswith("redis_url: ")
    assert "\n" not in line
    assert "s3cret" not in line
    assert "s3cret" not in repr(caught.value.__cause__)


def test_a_key_without_its_certificate_is_refused(tmp_path):
    (tmp_path / "key").touch()
    with pytest.raises(ConfigError, match="ssl_keyfile needs ssl_certfile"):
        parse_redis_url(f"rediss://h?ssl_keyfile={tmp_path}/key")


def test_a_login_hides_its_password():
    assert "s3cret" not in repr(parse_redis_url("redis://user:s3cret@h"))
