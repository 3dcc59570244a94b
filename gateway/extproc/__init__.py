"""The endpoint picker protocol: Envoy's external processor, as a gRPC service."""
