"""Tiers beyond the engine: CPU memory, disk and S3, kept by one LMCache server per node."""
