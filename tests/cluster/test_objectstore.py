"""Object storage that is slow and fails: what passes is waited for, what does not is said in one sentence."""

from __future__ import annotations

import http.server
import os
import pickle
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import boto3
import pyarrow as pa
import pyarrow.fs
import pytest
from s3.fault_proxy import FAULTS

from cluster import objectstore, shards, storage
from cluster.errors import RunError, UserError
from cluster.objectstore import ObjectStore
from stages.importing import imagefolder, parquet
from stages.importing.core import build_shard


def shard(number: int, rows: int = 20) -> pa.Table:
    image = [{"bytes": bytes([number % 256, row]) * 700, "path": f"{number}-{row}"} for row in range(rows)]
    schema = shards.image_schema(["ant", "bee"])
    return pa.table([pa.array(image, shards.IMAGE_TYPE), pa.array([number % 2] * rows)], schema=schema)


def objects(uri: str) -> list[str]:
    """Keys in the bucket of ``uri``, asked of the server itself."""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    return [each["Key"] for each in boto3.Session().client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_shards_through_a_store_that_fails_now_and_then(s3_store, fault_proxy):
    """Every kind of request, some 1,500 of them, one in fifty spoiled."""
    folder = f"{s3_store}/shards"
    proxy = fault_proxy(rate=0.02, stall_s=0.2)
    tables = [shard(n) for n in range(300)]

    def work(number: int) -> bool:
        uri = f"{folder}/{number:05d}.parquet"
        size = shards.write_shard(uri, tables[number])
        assert len(storage.read_bytes(uri)) == size
        assert shards.shard_metadata(uri)["num_rows"] == 20
        return shards.read_shard(uri).equals(tables[number])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(300)))
    assert len(storage.list_files(folder, ".parquet")) == 300
    storage.remove(folder)
    assert storage.list_files(folder) == {}
    assert proxy.done["requests"] > 1500
    assert all(proxy.done[fault] for fault in FAULTS), proxy.done


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_in_every_request_that_is_made_first(s3_store, fault_proxy, monkeypatch, fault):
    """Each request fails once, and is made once more; a stall longer than the time-out is given up."""
    monkeypatch.setattr(ObjectStore, "read_timeout", 0.3)
    seen: set[tuple[str, str]] = set()

    def first(method: str, path: str) -> bool:
        new = (method, path) not in seen
        seen.add((method, path))
        return new

    proxy = fault_proxy(rate=1.0, stall_s=0.6, only=first, kinds=(fault,))
    uri = f"{s3_store}/folder/x.parquet"
    shards.write_shard(uri, shard(1))
    assert storage.exists(uri)
    assert shards.read_shard(uri).equals(shard(1))
    assert len(storage.read_bytes(uri)) == storage.list_files(f"{s3_store}/folder")["x.parquet"]
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.resolve(uri)[0]))
    with arrow.open_input_stream(uri.removeprefix("s3://")) as stream:
        assert stream.read() == storage.read_bytes(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    assert proxy.done[fault] >= 5


@pytest.mark.slow
def test_a_large_object_is_read_whole_or_not_at_all(s3_store, fault_proxy):
    """As parts of a file, which s3fs itself does not read again when they break off."""
    data = os.urandom(3 * 2**20)
    storage.write_bytes(f"{s3_store}/large", data)
    proxy = fault_proxy(rate=0.5, kinds=("truncated", "reset"), only=lambda method, _: method == "GET")
    fs, path = storage.resolve(f"{s3_store}/large")
    assert fs.cat_file(path, chunksize=2**18, max_concurrency=4) == data
    with fs.open(path, "rb", block_size=2**18) as file:
        assert file.read() == data
    assert proxy.done["truncated"] + proxy.done["reset"] > 5


def test_a_half_upload_is_never_an_object(s3_store, fault_proxy, monkeypatch):
    storage.write_bytes(f"{s3_store}/old", b"as it was")
    address = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setattr(objectstore, "PATIENCE_S", 0.5)
    fault_proxy(rate=1.0, kinds=("truncated",), only=lambda method, _: method == "PUT")
    for name in ("old", "new"):
        with pytest.raises(RunError, match=rf"^{s3_store}/{name}: .* run the same command again to resume"):
            storage.write_bytes(f"{s3_store}/{name}", os.urandom(2**20))
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    ObjectStore.clear_instance_cache()
    time.sleep(0.5)  # for a server that works on what it got
    assert objects(s3_store) == ["old"]
    assert storage.read_bytes(f"{s3_store}/old") == b"as it was"


def test_a_half_upload_in_parts_is_never_an_object(s3_store, fault_proxy, monkeypatch):
    data = os.urandom(11 * 2**20)
    fs, path = storage.resolve(f"{s3_store}/parts")
    monkeypatch.setattr(objectstore, "PATIENCE_S", 0.5)
    proxy = fault_proxy(rate=1.0, kinds=("truncated",), only=lambda m, path: m == "PUT" and "partNumber=2" in path)
    fs, path = storage.resolve(f"{s3_store}/parts")
    with pytest.raises(RunError, match="fails again and again"):
        fs.pipe_file(path, data, chunksize=5 * 2**20)
    assert objects(s3_store) == []
    proxy.rate = 0.0
    fs.pipe_file(path, data, chunksize=5 * 2**20)
    assert storage.read_bytes(f"{s3_store}/parts") == data


def test_the_end_of_an_upload_in_parts_is_not_heard(s3_store, fault_proxy):
    data = os.urandom(11 * 2**20)
    lost: list[str] = []

    def first_end(method: str, path: str) -> bool:
        lost.extend([path] if method == "POST" and "uploadId" in path else [])
        return len(lost) == 1 and lost[0] == path

    proxy = fault_proxy(rate=1.0, kinds=("late_reset",), only=first_end)
    fs, path = storage.resolve(f"{s3_store}/parts")
    fs.pipe_file(path, data, chunksize=5 * 2**20)
    assert storage.read_bytes(f"{s3_store}/parts") == data
    assert proxy.done["late_reset"] == 1


def test_a_shard_cut_short_in_the_bucket_is_no_shard(s3_store):
    uri = f"{s3_store}/x.parquet"
    data = shards.table_bytes(shard(1))
    for length in (0, 3, 500, len(data) - 1):
        storage.write_bytes(uri, data[:length])
        assert shards.shard_metadata(uri) is None
        with pytest.raises(UserError, match="not a readable Parquet file"):
            shards.read_shard(uri)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    storage.write_bytes(uri, bytes(damaged))
    with pytest.raises(UserError, match="not a readable Parquet file"):
        shards.read_shard(uri)


def test_a_store_that_is_away_says_nothing_about_files(s3_store, fault_proxy, monkeypatch):
    """Neither that a shard is damaged, which would be made again, nor that an image is corrupt, which is left out."""
    uri = f"{s3_store}/train/ant/x.parquet"
    shards.write_shard(uri, shard(1))
    monkeypatch.setattr(objectstore, "PATIENCE_S", 0.5)
    proxy = fault_proxy(rate=0.0, kinds=("slow_down", "reset", "truncated"))
    assert storage.exists(uri)
    proxy.rate, proxy.only = 1.0, lambda method, _: method == "GET"
    for read in (shards.read_shard, shards.shard_metadata, storage.read_bytes):
        with pytest.raises(RunError, match=rf"^{uri}: the object store at .* fails again and again"):
            read(uri)
    read_parquet, read_folder = parquet.make_reader(s3_store), imagefolder.make_reader(s3_store)
    with pytest.raises(RunError, match="fails again and again"):
        read_parquet(["train/ant/x.parquet/0"])
    with pytest.raises(RunError, match="fails again and again"):
        build_shard(["train/ant/x.parquet"], [0], read_folder, ["ant", "bee"], {})


def test_more_objects_than_a_page_holds(s3_store, fault_proxy):
    folder = f"{s3_store}/many"
    fs, path = storage.resolve(folder)
    fs.pipe({f"{path}/{n:05d}.json": b"%d" % n for n in range(1100)})
    storage.write_bytes(f"{folder}/below/x.json", b"")
    storage.write_bytes(f"{s3_store}/many-others", b"")
    proxy = fault_proxy(rate=0.0)
    assert storage.list_files(folder) == {f"{n:05d}.json": len(str(n)) for n in range(1100)}
    assert [method for method, *_ in proxy.log] == ["GET", "GET"], "one listing, page by page"
    proxy.log.clear()
    assert storage.list_files(f"{s3_store}/many/none") == {}
    assert len(proxy.log) == 1, "an empty folder must not list the one above"
    proxy.log.clear()
    storage.remove(folder)
    assert [method for method, *_ in proxy.log] == ["GET", "GET", "POST", "POST"]
    assert objects(s3_store) == ["many-others"]
    storage.remove(folder)
    storage.remove(f"{s3_store}/many-others")
    assert objects(s3_store) == []


def test_a_whole_object_costs_one_request(s3_store, fault_proxy):
    storage.write_bytes(f"{s3_store}/a", b"1")
    proxy = fault_proxy(rate=0.0)
    assert storage.read_bytes(f"{s3_store}/a") == b"1"
    assert [method for method, *_ in proxy.log] == ["GET"]


def test_folders_are_not_made_and_buckets_neither(s3_store):
    fs, path = storage.resolve(f"{s3_store}/folder")
    fs.makedirs(path, exist_ok=True)
    other = f"prism-{uuid.uuid4().hex}"
    fs.mkdir(f"{other}/folder", create_parents=True)
    assert objects(s3_store) == []
    assert other not in [bucket["Name"] for bucket in boto3.Session().client("s3").list_buckets()["Buckets"]]


def test_workers_get_the_same_file_system(s3_store):
    fs, path = storage.resolve(f"{s3_store}/x")
    again = pickle.loads(pickle.dumps(fs))
    assert type(again) is ObjectStore
    again.pipe_file(path, b"1")
    assert storage.read_bytes(f"{s3_store}/x") == b"1"
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickle.dumps(fs)


@pytest.mark.parametrize("call", [storage.read_bytes, storage.exists, storage.list_files, shards.read_shard])
def test_missing_bucket_is_said_at_once(s3_store, fault_proxy, call):
    proxy = fault_proxy(rate=0.0)
    with pytest.raises(UserError, match=r"^s3://prism-no-such/x.*: there is no bucket 'prism-no-such' at http://127"):
        call("s3://prism-no-such/x.parquet")
    assert len(proxy.log) <= 2
    with pytest.raises(UserError, match=r"^out: s3://prism-no-such/x: there is no bucket .* create it or correct"):
        storage.check_writable("s3://prism-no-such/x", "out")


def test_missing_object_is_a_missing_file(s3_store):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3_store}/x")
    assert not storage.exists(f"{s3_store}/x")
    with pytest.raises(UserError, match="no such shard"):
        shards.read_shard(f"{s3_store}/x")


@pytest.mark.s3_real
def test_wrong_secret_is_said_at_once_by_a_store_that_checks_it(open_store, monkeypatch):
    store = open_store("swift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something else")
    ObjectStore.clear_instance_cache()
    with pytest.raises(UserError, match=rf"^{store}/x: the object store at .* does not accept the credentials"):
        storage.read_bytes(f"{store}/x")


class Canned(http.server.BaseHTTPRequestHandler):
    """Always the same answer."""

    status, code, count = 403, "AccessDenied", 0
    headers_of_get: dict[str, str] = {}
    body_of_get = b""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        type(self).count += 1
        body = (
            self.body_of_get or f"<Error><Code>{self.code}</Code><Message>no, secret-of-mine</Message></Error>".encode()
        )
        self.send_response(self.status)
        for name, value in self.headers_of_get.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def canned(monkeypatch):
    """A server that gives one answer: ``canned(status=…, code=…)`` returns its class, with the requests' ``count``."""
    servers = []

    def make(**attributes):
        handler = type("Answer", (Canned,), {"count": 0, **attributes})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        return handler

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-mine")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ObjectStore.clear_instance_cache()
    yield make
    ObjectStore.clear_instance_cache()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "does not accept the credentials (InvalidAccessKeyId); correct AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "does not accept the credentials (SignatureDoesNotMatch); correct"),
        (403, "AccessDenied", "access denied (AccessDenied); check the credentials, which need the rights to list"),
        (400, "ExpiredToken", "the credentials have expired; renew them"),
        (403, "RequestTimeTooSkewed", "the clock of this machine differs"),
        (301, "PermanentRedirect", "bucket 'bucket' is in another region; set AWS_DEFAULT_REGION"),
        (400, "AuthorizationHeaderMalformed", "bucket 'bucket' is in another region; set AWS_DEFAULT_REGION"),
        (400, "InvalidBucketName", "'bucket' cannot be the name of a bucket"),
    ],
)
def test_what_does_not_pass_is_said_at_once(canned, status, code, words):
    server = canned(status=status, code=code)
    with pytest.raises(UserError) as error:
        storage.read_bytes("s3://bucket/key")
    assert str(error.value).startswith("s3://bucket/key: ")
    assert words in str(error.value)
    assert "secret-of-mine" not in str(error.value)
    # botocore asks a redirecting store for the bucket's region.
    assert server.count <= (4 if status == 301 or code == "AuthorizationHeaderMalformed" else 1)


def test_what_passes_is_given_up_in_the_end(canned, monkeypatch):
    # The first try alone may take a second or two, in which the client is made.
    monkeypatch.setattr(objectstore, "PATIENCE_S", 6.0)
    monkeypatch.setattr(objectstore, "LONGEST_WAIT_S", 0.5)
    server = canned(status=503, code="SlowDown")
    with pytest.raises(RunError, match=r"^s3://bucket/key: .* \(SlowDown: no, \*\*\*\); run the same command again"):
        storage.read_bytes("s3://bucket/key")
    assert server.count >= 3


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Range": "bytes 0-99/1000"}, b"x" * 100),  # less than was asked for
        ({"Content-Range": "bytes 1-200/1000"}, b"x" * 200),  # another part
        ({"Content-Range": "bytes 0-199/1000"}, b"x" * 100),  # says one thing, sends another
        ({}, b"x" * 1000),  # the whole object
    ],
)
def test_a_part_other_than_asked_for_is_no_answer(canned, monkeypatch, headers, body):
    monkeypatch.setattr(objectstore, "PATIENCE_S", 0)
    canned(status=206, headers_of_get=headers, body_of_get=body)
    fs, path = storage.resolve("s3://bucket/key")
    with pytest.raises(RunError, match=r"^s3://bucket/key: .* came where bytes=0-199 was asked for"):
        fs.cat_file(path, start=0, end=200)


def test_no_store_at_the_address(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    ObjectStore.clear_instance_cache()
    with pytest.raises(
        RunError, match=r"^out: s3://bucket/x: no object store answers at http://127.* check AWS_ENDPOINT"
    ):
        storage.check_writable("s3://bucket/x", "out")
    ObjectStore.clear_instance_cache()


def test_no_credentials(canned, monkeypatch, tmp_path):
    server = canned()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(UserError, match=r"there are no valid credentials .* set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://bucket/key")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    ObjectStore.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://bucket/key: .*\(mine\).*; correct AWS_PROFILE"):
        storage.read_bytes("s3://bucket/key")
    assert server.count == 0


def test_addresses_of_other_stores(monkeypatch, tmp_path):
    """By path behind an address of one's own, unless the profile says otherwise; AWS as it is."""
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)

    def host() -> str:
        ObjectStore.clear_instance_cache()
        return ObjectStore().url("bucket/key").partition("?")[0]

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert host() == "https://bucket.s3.amazonaws.com/key"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example:9000")
    assert host() == "https://minio.example:9000/bucket/key"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    assert host() == "https://s3.example/bucket/key"
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    assert host() == "https://bucket.s3.example/key"
    ObjectStore.clear_instance_cache()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/key", "s3://***@bucket/key: "),
        ("s3://AKIAEXAMPLE:wJalr/XUtnFEMI@bucket/key", "s3://***@bucket/key: "),
        ("s3://AKIAEXAMPLE:wJalr/XUtnFEMI", "s3://***: "),
        ("s3a://AKIAEXAMPLE@bucket/key", "s3a://***@bucket/key: "),
        ("https://me:wJalrXUtnFEMI@host/key", "https://***@host/key: "),
        ("s3://bucket/key?X-Amz-Signature=wJalrXUtnFEMI", "s3://bucket/key: "),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(uri, shown):
    for call in (storage.resolve, storage.absolute, storage.read_bytes, storage.exists):
        with pytest.raises(UserError) as error:
            call(uri)
        assert str(error.value).startswith(shown)
        assert "AWS_PROFILE" in str(error.value)
        for secret in ("AKIA", "wJalr", "XUtn"):
            assert secret not in str(error.value)


def test_harmless_addresses(monkeypatch):
    for uri in ("s3://bucket/who@where/x", "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/key"):
        assert storage.absolute(uri) == uri


@pytest.mark.parametrize(
    "text",
    ["2026-01-02T03:04:05.000Z", "2026-01-02T03:04:05+00:00", "2026-01-02T03:04:05", "Fri, 02 Jan 2026 03:04:05 GMT"],
)
def test_times_of_listings_and_headers_read_alike(text: str) -> None:
    assert objectstore._time(text) == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
