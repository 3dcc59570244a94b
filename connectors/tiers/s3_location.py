"""Where a bucket is, and how it is reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class S3Location:
    """A place in a bucket."""

    bucket: str
    prefix: str
    """Without slashes around it; empty for the whole bucket."""
    region: str
    endpoint: str = ""
    """URL of a server that speaks S3; empty for AWS."""

    @property
    def url(self) -> str:
        """What a person calls it, and no other place has for a name."""
        url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        return f"{url} at {self.endpoint}" if self.endpoint else url

    @property
    def is_tls(self) -> bool:
        """Whether it is reached over TLS."""
        return not self.endpoint.startswith("http://")

    @property
    def host(self) -> str:
        """Host of its requests: AWS has one per bucket, servers of one's own seldom have a name for each."""
        return urlsplit(self.endpoint).netloc or f"{self.bucket}.s3.{self.region}.amazonaws.com"

    @property
    def base(self) -> str:
        """What stands before an object's name in its key."""
        return f"{self.prefix}/" if self.prefix else ""

    @property
    def path_base(self) -> str:
        """What stands before an object's name in the path of a request, behind the first slash."""
        return f"{self.bucket}/{self.base}" if self.endpoint else self.base

    def client(self) -> Any:  # noqa: ANN401 - boto3 makes its clients' classes at run time
        """Return a client of boto3: for listings and checks, not for chunks."""
        import boto3
        from botocore.config import Config

        return boto3.Session().client(  # a new one finds credentials anew
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint or None,
            config=Config(
                connect_timeout=5,
                read_timeout=20,
                retries={"total_max_attempts": 2},
                s3={"addressing_style": "path" if self.endpoint else "virtual"},
            ),
        )
