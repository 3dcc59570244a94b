"""Envoy's bootstrap: listener, route and clusters are fixed here, only the endpoints are dynamic. Pure.

Source: Envoy 1.40, API v3. Why each setting that differs from Envoy's default is there stands beside it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gateway.access_log import DECISION_HEADER, LOG_NAME, TTFT_TAG
from gateway.config import split_address
from gateway.extproc.messages import PICK_KEY, PICK_NAMESPACE, REFUSAL_DETAILS
from gateway.readiness import EXT_PROC_SERVICE
from kvindex.tls import ClientTls, ServerTls

Json = dict[str, Any]

WORKERS = "kvlane_workers"
GATEWAY = "kvlane_gateway"

# One ext_proc stream stays open per request; Envoy's default of 1,024 turns the next into errors.
_MANY_REQUESTS = 1_000_000

# A response may stay silent for as long as a long prompt is computed.
_IDLE_TIMEOUT = "3600s"

# Engines close a connection after 5 s without requests (uvicorn's default, and vLLM's). A request that is
# sent at that moment is lost, and may not be sent again: so Envoy closes it first.
_WORKER_IDLE_TIMEOUT = "4s"

_TLS_VERSIONS = {"tls_params": {"tls_minimum_protocol_version": "TLSv1_2"}}

# A gateway that comes later is found at once; by default the pauses grow to half a minute.
_RECONNECT = {"retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"}}


class LbPolicy(enum.StrEnum):
    """Who gets a request that was not picked for: all of them, where ext_proc is off."""

    LEAST_REQUEST = "least_request"
    ROUND_ROBIN = "round_robin"


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What differs between one kvlane Envoy and the next. Addresses are `host:port`."""

    listen: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:9901"
    gateways: tuple[str, ...] = ("127.0.0.1:9002",)
    """One Envoy thread holds one connection to a gateway process: more processes are more addresses."""
    workers: tuple[str, ...] = ()
    """Fixed workers, `ip:port`; none: as the gateways tell."""
    ext_proc: bool = True
    lb_policy: LbPolicy = LbPolicy.LEAST_REQUEST
    fail_open: bool = True
    """Without a gateway Envoy chooses; otherwise requests fail."""
    max_body_bytes: int = 16 << 20
    ext_proc_timeout_s: float = 5.0
    """Longest wait for one answer of a gateway."""
    tls: ServerTls | None = None
    """Of the port for clients. Files are read by Envoy, when it starts."""
    gateway_tls: ClientTls | None = None
    """To the gateways; None: in the clear."""
    worker_tls: ClientTls | None = None
    """To the workers; None: in the clear."""


def bootstrap(options: EnvoyOptions) -> Json:
    """Return the whole configuration of one Envoy.

    Raises:
        ValueError: an address is not `host:port`, or Envoy would trust any certificate.
    """
    return {
        "node": {"id": "kvlane", "cluster": "kvlane"},
        "admin": {"address": _address(options.admin)},
        "static_resources": {
            "listeners": [_listener(options)],
            "clusters": [_worker_cluster(options), _gateway_cluster(options)],
        },
    }


def to_yaml(config: Json) -> str:
    """Return a configuration as Envoy reads it."""
    return yaml.safe_dump(config, sort_keys=False)


def _listener(options: EnvoyOptions) -> Json:
    return {
        "name": "openai",
        "address": _address(options.listen),
        # A request is routed by its whole body; a larger one is answered 413.
        "per_connection_buffer_limit_bytes": options.max_body_bytes,
        "filter_chains": [
            {
                "filters": [_typed("envoy.filters.network.http_connection_manager", _http(options))],
                **_transport(_downstream(options.tls) if options.tls else None),
            }
        ],
    }


def _transport(context: Json | None) -> Json:
    """Return a listener's or cluster's transport socket; nothing for connections in the clear."""
    return {"transport_socket": _typed("envoy.transport_sockets.tls", context)} if context else {}


def _downstream(tls: ServerTls) -> Json:
    validation = {"validation_context": {"trusted_ca": _file(tls.client_ca)}} if tls.client_ca else {}
    return {
        "@type": "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": tls.client_ca is not None,
        "common_tls_context": {
            **_TLS_VERSIONS,
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [_pair(tls.cert, tls.key)],
            **validation,
        },
    }


def _upstream(tls: ClientTls) -> Json:
    if tls.ca is None:
        raise ValueError("name the CA: without one, Envoy would trust any certificate")
    own = {"tls_certificates": [_pair(tls.cert, tls.key)]} if tls.cert and tls.key else {}
    return {
        "@type": "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {
            **_TLS_VERSIONS,
            "validation_context": {"trusted_ca": _file(tls.ca)},
            **own,
        },
    }


def _pair(cert: Path, key: Path) -> Json:
    return {"certificate_chain": _file(cert), "private_key": _file(key)}


def _file(path: Path) -> Json:
    return {"filename": str(path)}


def _http(options: EnvoyOptions) -> Json:
    filters = [
        _typed("envoy.filters.http.router", {"@type": "envoy.extensions.filters.http.router.v3.Router"})
    ]
    if options.ext_proc:
        filters.insert(0, _typed("envoy.filters.http.ext_proc", _ext_proc(options)))
    return {
        "@type": ("envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "openai",
        "codec_type": "AUTO",
        "stream_idle_timeout": _IDLE_TIMEOUT,
        "use_remote_address": True,
        # The client's id is what its receipt is found by.
        "preserve_external_request_id": True,
        # Only ext_proc may pick.
        "early_header_mutation_extensions": [
            _typed(
                "envoy.http.early_header_mutation.header_mutation",
                {
                    "@type": (
                        "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
                    ),
                    "mutations": [{"remove": PICK_KEY}],
                },
            )
        ],
        "access_log": [_access_log()] if options.ext_proc else [],
        "local_reply_config": {"mappers": _local_replies(options.max_body_bytes)},
        "http_filters": filters,
        "route_config": {
            "name": "openai",
            "virtual_hosts": [
                {
                    "name": "openai",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {
                                "cluster": WORKERS,
                                "timeout": "0s",
                                "retry_policy": {
                                    # Only before a worker has seen the request.
                                    "retry_on": "connect-failure,reset-before-request",
                                    "num_retries": 3,
                                },
                            },
                        }
                    ],
                }
            ],
        },
    }


def _ext_proc(options: EnvoyOptions) -> Json:
    return {
        "@type": "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": GATEWAY}},
        "failure_mode_allow": options.fail_open,
        "message_timeout": _seconds(options.ext_proc_timeout_s),
        # BUFFERED keeps the stream open until the response has ended: its end settles the reservation.
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
            "response_trailer_mode": "SKIP",
        },
        "metadata_options": {"receiving_namespaces": {"untyped": [PICK_NAMESPACE]}},
    }


def _access_log() -> Json:
    return _typed(
        "envoy.access_loggers.http_grpc",
        {
            "@type": "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": LOG_NAME,
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": GATEWAY}},
                # Rates are corrected by these; a second, the default, is many requests late.
                "buffer_flush_interval": "0.1s",
                "custom_tags": [{"tag": TTFT_TAG, "value": "%COMMON_DURATION(DS_RX_BEG:US_RX_BODY_BEG:us)%"}],
            },
            "additional_response_headers_to_log": [DECISION_HEADER],
        },
    )


def _local_replies(max_body_bytes: int) -> list[Json]:
    """Return what turns Envoy's own answers into OpenAI errors; the gateway's pass as they are."""
    retry = [{"header": {"key": "retry-after", "value": "1"}}]
    no_worker = "No worker is live. Try again in a moment."
    lost = "The worker went away before it answered (%RESPONSE_CODE_DETAILS%). Send the request again."
    too_large = f"The request body is larger than {max_body_bytes} bytes."
    return [
        {
            "filter": {"response_flag_filter": {"flags": ["UH"]}},
            "headers_to_add": retry,
            "body_format_override": _error("ServiceUnavailableError", no_worker),
        },
        {
            "filter": {"response_flag_filter": {"flags": ["UF", "UC", "UR", "UO", "URX", "LR"]}},
            "headers_to_add": retry,
            "body_format_override": _error("ServiceUnavailableError", lost),
        },
        {
            "filter": _envoys_own("response.code == 413"),
            "body_format_override": _error("BadRequestError", too_large),
        },
        {
            "filter": _envoys_own("true"),
            "body_format_override": _error("EnvoyError", "%LOCAL_REPLY_BODY%"),
        },
    ]


def _envoys_own(condition: str) -> Json:
    return {
        "extension_filter": _typed(
            "envoy.access_loggers.extension_filters.cel",
            {
                "@type": "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": f"response.code_details != '{REFUSAL_DETAILS}' && {condition}",
            },
        )
    }


def _error(kind: str, message: str) -> Json:
    error = {"message": message, "type": kind, "param": None, "code": "%RESPONSE_CODE%"}
    return {"json_format": {"error": error}}


def _worker_cluster(options: EnvoyOptions) -> Json:
    cluster: Json = {
        "name": WORKERS,
        "connect_timeout": "2s",
        "load_balancing_policy": _policies(options),
        "circuit_breakers": _circuit_breakers(max_retries=1_024),
        **_speaking({"http_protocol_options": {}}, idle_timeout=_WORKER_IDLE_TIMEOUT),
        # A machine that vanished sends no reset.
        "upstream_connection_options": {
            "tcp_keepalive": {"keepalive_time": 10, "keepalive_interval": 5, "keepalive_probes": 3}
        },
        # A worker that cannot be reached is skipped; an engine's own 5xx is its answer.
        "outlier_detection": {
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_time": "10s",
            "max_ejection_percent": 100,
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 2,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
        },
    }
    cluster |= _transport(_upstream(options.worker_tls) if options.worker_tls else None)
    if options.workers:
        return cluster | {"type": "STATIC", "load_assignment": _load_assignment(WORKERS, options.workers)}
    return cluster | {
        "type": "EDS",
        "eds_cluster_config": {
            "service_name": WORKERS,
            "eds_config": {
                "resource_api_version": "V3",
                # Without a gateway the listener opens after this, and has no worker.
                "initial_fetch_timeout": "2s",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": GATEWAY, "retry_policy": _RECONNECT}}],
                },
            },
        },
    }


def _policies(options: EnvoyOptions) -> Json:
    fallback = _policy(options.lb_policy, {"@type": _policy_type(options.lb_policy)})
    if not options.ext_proc:
        return fallback
    return _policy(
        "override_host",
        {
            "@type": _policy_type("override_host"),
            # Metadata alone: a header could come from a client.
            "override_host_sources": [{"metadata": {"key": PICK_NAMESPACE, "path": [{"key": PICK_KEY}]}}],
            "fallback_policy": fallback,
        },
    )


def _policy(name: str, config: Json) -> Json:
    extension = _typed(f"envoy.load_balancing_policies.{name}", config)
    return {"policies": [{"typed_extension_config": extension}]}


def _policy_type(name: str) -> str:
    message = "".join(word.capitalize() for word in name.split("_"))
    return f"envoy.extensions.load_balancing_policies.{name}.v3.{message}"


def _gateway_cluster(options: EnvoyOptions) -> Json:
    # A gateway that hangs is found out; a busy one gets its time.
    http2 = {"http2_protocol_options": {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}}
    return {
        "name": GATEWAY,
        "type": "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": _load_assignment(GATEWAY, options.gateways),
        **_transport(_upstream(options.gateway_tls) if options.gateway_tls else None),
        "circuit_breakers": _circuit_breakers(max_retries=3),
        **_speaking(http2),
        "outlier_detection": {"interval": "1s", "base_ejection_time": "1s", "consecutive_gateway_failure": 2},
        # One that starts, stops or hangs gets no request while another is ready.
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": EXT_PROC_SERVICE},
            }
        ],
    }


def _speaking(explicit: Json, *, idle_timeout: str | None = None) -> Json:
    """Return what a cluster speaks, and how long it keeps a connection without requests."""
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    idle: Json = {"common_http_protocol_options": {"idle_timeout": idle_timeout}} if idle_timeout else {}
    return {
        "typed_extension_protocol_options": {
            name: _any({"@type": name, **idle, "explicit_http_config": explicit})
        }
    }


def _circuit_breakers(*, max_retries: int) -> Json:
    threshold = {
        "max_connections": _MANY_REQUESTS,
        "max_pending_requests": _MANY_REQUESTS,
        "max_requests": _MANY_REQUESTS,
        "max_retries": max_retries,
    }
    return {"thresholds": [threshold]}


def _load_assignment(cluster: str, addresses: tuple[str, ...]) -> Json:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]}


def _address(address: str) -> Json:
    host, port = split_address(address)
    return {"socket_address": {"address": host, "port_value": port}}


def _typed(name: str, config: Json) -> Json:
    return {"name": name, "typed_config": _any(config)}


def _any(config: Json) -> Json:
    return config | {"@type": f"type.googleapis.com/{config['@type']}"}


def _seconds(seconds: float) -> str:
    return f"{seconds:g}s"
