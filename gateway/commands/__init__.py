"""Commands that run beside Envoy."""
