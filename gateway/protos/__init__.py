"""Envoy's API, the part we speak: generated from the `.proto` files beside it."""
