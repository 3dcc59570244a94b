"""`lmcache`, with our disk and S3 tiers among its adapters.

Source: LMCache 0.5.6 `lmcache/v1/distributed/l2_adapters/factory.py` and `lmcache/cli/main.py`.
"""

from __future__ import annotations

from lmcache.cli.main import main
from lmcache.v1.distributed.l2_adapters.config import register_l2_adapter_type
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory

from connectors.tiers import bucket, disk


def register() -> None:
    """Make the adapters known to LMCache in this process. Once."""
    register_l2_adapter_type(disk.TYPE, disk.DiskTierConfig)
    register_l2_adapter_factory(disk.TYPE, lambda config, _: disk.DiskTier(config))
    register_l2_adapter_type(bucket.TYPE, bucket.BucketTierConfig)
    register_l2_adapter_factory(bucket.TYPE, lambda config, _: bucket.BucketTier(config))


if __name__ == "__main__":
    register()
    main()
