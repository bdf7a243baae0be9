"""The ``s3://`` file system: one place that knows which errors of an object store pass, and what to say of the others.

botocore and s3fs each retry on their own, one inside the other, and neither repeats a body that breaks off in every
kind of read. Both are told to try once; here a request and the reading of its answer are one step, which is repeated
for throttling, resets, broken bodies and time-outs until ``PATIENCE_S`` is over.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import re
from datetime import UTC, datetime
from typing import Any

import botocore.exceptions as boto
import botocore.session
import botocore.utils
import tenacity
from aiobotocore.session import AioSession
from aiohttp import ClientPayloadError
from botocore.parsers import ResponseParserError
from fsspec.asyn import FSTimeoutError, sync_wrapper
from s3fs import S3FileSystem

from cluster.errors import PrismError, RunError, TransientError, UserError, first_line, redact

log = logging.getLogger("prism")

# A store that splits a busy prefix, or is started again, is away for minutes; a unit costs more.
PATIENCE_S = 300
# Before the store has answered this process once, a wrong address is likelier than a store that is away.
FIRST_TRIES = 4
LONGEST_WAIT_S = 20
CONNECTIONS = 32

# Answers below 500 that pass: a body damaged or too slow on its way up, and throttling by other stores.
PASSING_CODES = {
    "BadDigest", "BandwidthLimitExceeded", "IncompleteBody", "InternalError", "OperationAborted",
    "RequestLimitExceeded", "RequestThrottled", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
}  # fmt: skip
WRONG_KEYS = {"InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "SignatureDoesNotMatch"}
WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
# What s3fs has an exception of its own for.
SPEAKING = {"PreconditionFailed", "412", "InvalidRange", "416"}
DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}

# Addresses without a server, servers without a certificate, and connections that take too long.
UNREACHABLE = boto.ConnectionError
# HTTPClientError has the time-outs, closed connections and bodies that break off.
PASSING = (
    UNREACHABLE, boto.HTTPClientError, boto.IncompleteReadError, ClientPayloadError, ResponseParserError,
    FSTimeoutError, asyncio.TimeoutError, ConnectionError,
)  # fmt: skip
NO_CREDENTIALS = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError, boto.SSOError,
)  # fmt: skip

_ASKED = re.compile(r"bytes=(\d+)-(\d*)$")
_CAME = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")

# Roles of machines: one late answer of the metadata service must not look like missing credentials.
os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "4")


class BrokenBodyError(ConnectionError):
    """An answer that is not the part of the object that was asked for."""


class _Body:
    """A body that is read already, with the interface that s3fs expects."""

    def __init__(self, data: bytes):
        self._data = data

    async def read(self) -> bytes:
        return self._data

    def close(self) -> None:
        self._data = b""


class ObjectStore(S3FileSystem):  # type: ignore[misc]
    """``s3://`` on AWS and on the stores that speak its protocol.

    Endpoint, region, keys and profile come from the requester's environment and files, as every AWS tool reads them.
    """

    retries = 1
    connect_timeout = 10
    read_timeout = 30

    def __init__(self, **options: Any):
        # Others write to the same folders, so a listing is old as soon as it is made.
        super().__init__(**{"use_listings_cache": False, "session": _session(), **options})
        self._answered = False

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        profile = botocore.session.Session().get_scoped_config()
        config = {
            **super()._prepare_config_kwargs(),
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # All threads of a process share them; one that stands still must not hold up the rest.
            "max_pool_connections": CONNECTIONS,
        }
        if endpoint() and "addressing_style" not in (profile.get("s3") or {}):
            # A store of one's own seldom has a host name for every bucket.
            config["s3"] = {"addressing_style": "path"}
        if not os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") and "request_checksum_calculation" not in profile:
            # The newer checksums are unknown to many stores; Content-MD5, below, is known to all.
            config["request_checksum_calculation"] = "when_required"
        return config

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        where = "/".join(str(kwargs[k]) for k in ("Bucket", "Key", "Prefix") if kwargs.get(k)).rstrip("/")
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(passes),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S),
            stop=self._is_enough,
            before_sleep=lambda state: log.info("s3://%s: %s, trying again", where, _reason(_raised(state))),
            reraise=True,
        )
        try:
            return await attempts(self._request, method, *args, **kwargs)
        except Exception as error:
            said = explain(error, f"s3://{where}", self._answered)
            raise said or error from (None if said else error.__cause__)

    # The synchronous twins have to be bound anew, for they hold on to the coroutine they were made from.
    call_s3 = sync_wrapper(_call_s3)

    async def _request(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One request and the whole of its answer."""
        body = kwargs.get("Body")
        if method in ("put_object", "upload_part") and isinstance(body, bytes | bytearray | memoryview):
            kwargs["ContentMD5"] = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        try:
            answer = await super()._call_s3(method, *args, **kwargs)
        except Exception as error:
            self._answered |= _response(error) is not None
            raise
        self._answered = True
        if method == "get_object":
            answer["Body"] = _Body(await _whole_body(answer, kwargs.get("Range") or _given(args, "Range")))
        elif method == "delete_objects" and answer.get("Errors"):
            failed = answer["Errors"][0]
            raise boto.ClientError({"Error": {"Code": failed.get("Code"), "Message": failed.get("Message")}}, method)
        return answer

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        wrong_address = not self._answered and isinstance(_raised(state), UNREACHABLE)
        return (wrong_address and state.attempt_number >= FIRST_TRIES) or tenacity.stop_after_delay(PATIENCE_S)(state)

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        # One request. With more at a time s3fs asks for the size of every object first.
        data: bytes = await super()._cat_file(path, *args, **{"max_concurrency": 1, **kwargs})
        return data

    async def _pipe_file(self, path: str, data: bytes, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._pipe_file(path, data, *args, **kwargs)
        except FileNotFoundError:
            # An upload in parts whose end was answered, but not heard: asked again, the store knows it no more.
            return await super()._pipe_file(path, data, *args, **kwargs)

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing: folders need not be made, and a bucket is its owner's to make."""

    mkdir = sync_wrapper(_mkdir)

    async def _list_folder(self, path: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = await self._lsdir(path.rstrip("/"))
        return entries

    # Unlike ``ls``, which lists the whole folder above where one is empty.
    list_folder = sync_wrapper(_list_folder)

    async def _remove(self, path: str) -> None:
        below = [entry["name"] for entry in await self._lsdir(path.rstrip("/"), delimiter="")]
        # Whether there is an object of this very name need not be asked: deleting none is fine.
        names = [path, *below] if "/" in path else below
        for start in range(0, len(names), 1000):
            await self._bulk_delete(names[start : start + 1000])

    # A file or a folder, in two requests; ``rm`` asks up to five times what it is.
    remove = sync_wrapper(_remove)


def _session() -> AioSession:
    """Of this process, with a reader of times that is made for listings: botocore's takes half of what these cost."""
    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    return session


def _time(text: Any) -> datetime:
    """A time as stores write it in listings, or in one of the formats of headers."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return botocore.utils.parse_timestamp(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def endpoint() -> str | None:
    """Address of a store other than AWS, as the environment names it."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    response = _response(error)
    if response is None:
        return isinstance(error, PASSING)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return _code(response) in PASSING_CODES or status in (408, 429) or (status >= 500 and status != 501)


def explain(error: BaseException, uri: str, answered: bool) -> PrismError | None:
    """One sentence on what is wrong with a request and what to do; None where the error speaks for itself.

    Args:
        error: of s3fs or botocore.
        uri: what the request was for.
        answered: whether the store has ever answered.
    """
    if isinstance(error, PrismError):
        return error
    at = f" at {redact(str(endpoint()))}" if endpoint() else ""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if isinstance(error, NO_CREDENTIALS):
        return UserError(
            f"{uri}: there are no valid credentials for object storage ({first_line(error)}); set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, boto.ProfileNotFound):
        return UserError(f"{uri}: {first_line(error)}; correct AWS_PROFILE")
    if isinstance(error, boto.ParamValidationError):
        return UserError(f"{uri}: {bucket!r} cannot be the name of a bucket; correct it")
    if isinstance(error, (ValueError, boto.BotoCoreError)) and "endpoint" in str(error).lower() and not passes(error):
        return UserError(f"{uri}: {first_line(error)}; correct AWS_ENDPOINT_URL")
    if isinstance(error, UNREACHABLE) and not answered:
        return TransientError(
            f"{uri}: no object store answers{at} ({_reason(error)}); check AWS_ENDPOINT_URL and the network, "
            "then run the same command again to resume"
        )
    response = _response(error)
    code = _code(response) if response is not None else ""
    if code == "NoSuchBucket":
        return UserError(f"{uri}: there is no bucket {bucket!r}{at}; create it or correct its name")
    if code == "InvalidBucketName":
        return UserError(f"{uri}: {bucket!r} cannot be the name of a bucket; correct it")
    if code in WRONG_KEYS:
        return UserError(
            f"{uri}: the object store{at} does not accept the credentials ({code}); correct AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_ENDPOINT_URL where they are for another store"
        )
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return UserError(f"{uri}: the credentials have expired; renew them and run the same command again to resume")
    if code == "RequestTimeTooSkewed":
        return UserError(f"{uri}: the clock of this machine differs from the object store's; set it right")
    if code in WRONG_REGION:
        return UserError(f"{uri}: bucket {bucket!r} is in another region; set AWS_DEFAULT_REGION to its own")
    if code in DENIED:
        return UserError(
            f"{uri}: access denied ({code}); check the credentials, which need the rights to list bucket {bucket!r} "
            "and to get, put and delete its objects"
        )
    if passes(error):
        return TransientError(
            f"{uri}: the object store{at} fails again and again ({_reason(error)}); "
            "run the same command again to resume"
        )
    if response is not None and not isinstance(error, FileNotFoundError) and code not in SPEAKING:
        return RunError(f"{uri}: the object store{at} refuses the request ({_reason(error)})")
    return None


def _response(error: BaseException) -> dict[str, Any] | None:
    """What the server answered, where the error is one; s3fs puts its own on top of botocore's."""
    found = error if isinstance(error, boto.ClientError) else error.__cause__
    return dict(found.response) if isinstance(found, boto.ClientError) else None


def _code(response: dict[str, Any]) -> str:
    return str(response.get("Error", {}).get("Code") or "")


def _reason(error: BaseException) -> str:
    response = _response(error)
    if response is not None:
        return redact(f"{_code(response)}: {response.get('Error', {}).get('Message') or 'without a reason'}")
    # botocore's own words are the URL.
    inner = error.kwargs.get("error") if isinstance(error, boto.BotoCoreError) else None
    return first_line(inner if isinstance(inner, Exception) else error)


def _raised(state: tenacity.RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    return error or RuntimeError()


def _given(args: tuple[Any, ...], name: str) -> Any:
    return next((each[name] for each in args if isinstance(each, dict) and name in each), None)


async def _whole_body(answer: dict[str, Any], asked: str | None) -> bytes:
    """The body of an answer.

    Raises:
        BrokenBodyError: it is shorter than announced, or another part of the object than ``asked``.
    """
    stream = answer["Body"]
    try:
        data: bytes = await stream.read()
    finally:
        stream.close()
    announced = answer.get("ContentLength")
    if announced is not None and len(data) != announced:
        raise BrokenBodyError(f"{len(data)} of {announced} bytes came")
    wanted = _ASKED.match(asked or "")
    if wanted:
        came = _CAME.match(answer.get("ContentRange") or "")
        start, end, size = map(int, came.groups()) if came else (-1, -1, 0)
        last = min(int(wanted[2] or size), size - 1)
        if (start, end) != (int(wanted[1]), last) or len(data) != end - start + 1:
            raise BrokenBodyError(
                f"{answer.get('ContentRange') or 'the whole object'} came where {asked} was asked for"
            )
    return data
