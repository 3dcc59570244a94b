"""PUT and GET with awscrt and nothing around it: what a tier in S3 is measured against."""

from __future__ import annotations

import ctypes
import io
import time
from typing import Any

from awscrt import auth, s3
from awscrt import io as crt_io
from awscrt.http import HttpHeaders, HttpRequest

from connectors.tiers.s3_location import S3Location

_NUM_THREADS = 4


class PlainS3:
    """A client that moves several objects at once, with the credentials that boto3 finds."""

    def __init__(self, location: S3Location) -> None:
        import boto3

        found = boto3.Session().get_credentials().get_frozen_credentials()
        self._location = location
        self._credentials = auth.AwsCredentialsProvider.new_static(
            found.access_key, found.secret_key, found.token
        )
        group = crt_io.EventLoopGroup(_NUM_THREADS)
        self._client = s3.S3Client(
            bootstrap=crt_io.ClientBootstrap(group, crt_io.DefaultHostResolver(group)),
            region=location.region,
            tls_mode=s3.S3RequestTlsMode.ENABLED if location.is_tls else s3.S3RequestTlsMode.DISABLED,
        )

    def put(self, contents: list[bytes]) -> float:
        """Store objects at once; return the seconds that took."""
        started = time.perf_counter()
        futures = []
        for index, content in enumerate(contents):
            headers = [("Content-Length", str(len(content)))]
            request = self._request("PUT", index, headers, io.BytesIO(content))
            futures.append(self._perform(s3.S3RequestType.PUT_OBJECT, request, len(content)))
        for future in futures:
            future.result()
        return time.perf_counter() - started

    def get(self, num_objects: int, size: int) -> float:
        """Load objects at once, into buffers that are there; return the seconds that took."""
        buffers = [ctypes.create_string_buffer(size) for _ in range(num_objects)]
        started = time.perf_counter()
        futures = []
        for index, buffer in enumerate(buffers):

            def take(chunk: bytes, offset: int, buffer: Any = buffer, **_: Any) -> None:  # noqa: ANN401
                ctypes.memmove(ctypes.addressof(buffer) + offset, chunk, len(chunk))

            request = self._request("GET", index, [], None)
            futures.append(self._perform(s3.S3RequestType.GET_OBJECT, request, size, on_body=take))
        for future in futures:
            future.result()
        return time.perf_counter() - started

    def clear(self, num_objects: int) -> None:
        """Remove them."""
        client = self._location.client()
        for index in range(num_objects):
            client.delete_object(Bucket=self._location.bucket, Key=f"{self._location.base}plain-{index}")

    def _request(
        self, method: str, index: int, headers: list[tuple[str, str]], body: io.BytesIO | None
    ) -> HttpRequest:
        path = f"/{self._location.path_base}plain-{index}"
        return HttpRequest(
            method, path, HttpHeaders([("Host", self._location.host), *headers]), body_stream=body
        )

    def _perform(self, kind: s3.S3RequestType, request: HttpRequest, size: int, **callbacks: Any) -> Any:  # noqa: ANN401 - awscrt's
        return s3.S3Request(
            client=self._client,
            type=kind,
            request=request,
            credential_provider=self._credentials,
            region=self._location.region,
            part_size=max(size, 5 << 20),
            multipart_upload_threshold=max(size, 5 << 20) + 1,
            **callbacks,
        ).finished_future
