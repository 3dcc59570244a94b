"""Benches of moving KV."""
