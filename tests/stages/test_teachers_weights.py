"""Weights files: what is read, what is refused, and how foreign names find their place."""

from __future__ import annotations

import hashlib
import pickle
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from cluster import storage
from cluster.errors import UserError
from stages.teachers.build import build_network
from stages.teachers.options import KeyMap, NetworkSpec, TeacherSpec
from stages.teachers.pretrained import load_pretrained
from stages.teachers.weights import apply_weights, load_state, save_weights


def network(seed=0, width=4) -> nn.Module:
    return build_network(NetworkSpec(arch="builtin:convnet_d3", kwargs={"width": width}), 3, 3, seed=seed)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch"])
def test_formats(tmp_path, kind):
    state, path = network().state_dict(), tmp_path / "file"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    assert equal(load_state(str(path)), state)


def test_saved_bytes_are_a_function_of_the_tensors(tmp_path):
    state = network().state_dict()
    first = save_weights(str(tmp_path / "a"), state)
    laid_out = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    second = save_weights(str(tmp_path / "b"), dict(reversed(laid_out.items())))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == first
    assert equal(load_state(str(tmp_path / "a")), state)


@pytest.mark.parametrize("kind", ["zip", "bare"])
def test_pickle_is_refused_and_not_executed(tmp_path, capfd, kind):
    path = tmp_path / "evil.pt"
    if kind == "zip":
        torch.save({"state_dict": network().state_dict(), "extra": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt.*unpickling.*safetensors"):
        load_state(str(path))
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "neither"), (b"hello, world, this is text", "neither"), (b"PK\x03\x04 cut off", "damaged|unpickling")],
)
def test_other_files_are_refused(tmp_path, content, words):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_state(str(tmp_path / "w"))


def test_whole_module_and_tensor_are_refused(tmp_path):
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(UserError, match="unpickling"):
        load_state(str(tmp_path / "module.pt"))
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="state dict"):
        load_state(str(tmp_path / "tensor.pt"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors.*no such"):
        load_state(str(tmp_path / "none.safetensors"))


def foreign(state):
    """As another program would store it."""
    renamed = {f"module.{k.replace('features.', 'blocks.').replace('head', 'fc')}": v for k, v in state.items()}
    del renamed["module.blocks.0.1.num_batches_tracked"]
    return {"epoch": 3, "state_dict": renamed | {"module.ema": torch.ones(1)}, "optimizer": {"lr": 0.1}}


MAP = KeyMap(
    state_key="state_dict",
    strip_prefix="module.",
    rename=[(r"^blocks\.", "features."), (r"^fc\.", "head.")],
    ignore_unexpected=[r"ema$"],
)


def test_key_map():
    source, target = network(1).state_dict(), network(2)
    apply_weights(target, foreign(source), MAP, "teachers.a")
    found = target.state_dict()
    assert all(torch.equal(found[k], source[k]) for k in found if not k.endswith("num_batches_tracked"))


def change(**update) -> KeyMap:
    return MAP.model_copy(update=update)


@pytest.mark.parametrize(
    ("key_map", "words"),
    [
        (change(state_key=None), ["state_dict", "optimizer", "key_map.state_key"]),
        (change(state_key="model"), ["'model'", "state_dict"]),
        (change(strip_prefix=""), ["unexpected", "missing", "module.", "key_map"]),
        (change(rename=MAP.rename[:1]), ["2 missing (head.weight, head.bias)", "2 unexpected (fc.weight, fc.bias)"]),
        (change(ignore_unexpected=[]), ["1 unexpected (ema)"]),
        (change(ignore_missing=[]), ["1 missing (features.0.1.num_batches_tracked)"]),
        (change(rename=[(r"blocks\.\d", "features.0")]), ["two names", "features.0"]),
        (change(rename=[("(", "x")]), ["key_map.rename", "invalid"]),
        (change(rename=[("blocks", r"\2")]), ["key_map.rename", "invalid"]),
    ],
)
def test_names_that_do_not_fit(key_map, words):
    before = network(2)
    after = network(2)
    with pytest.raises(UserError) as error:
        apply_weights(after, foreign(network(1).state_dict()), key_map, "teachers.a")
    assert all(word in str(error.value) for word in ["teachers.a", *words]), str(error.value)
    assert equal(before.state_dict(), after.state_dict())


def test_shapes_that_differ():
    with pytest.raises(UserError, match=r"of another shape \(features.0.0.weight \[8, 3, 3, 3\] instead of \[4,"):
        apply_weights(network(), network(width=8).state_dict(), KeyMap(), "x")


def test_what_is_no_tensor():
    state = {**network().state_dict(), "note": "hello"}
    with pytest.raises(UserError, match="note is a str"):
        apply_weights(network(), state, KeyMap(), "x")
    apply_weights(network(), state, KeyMap(ignore_unexpected=["^note$"]), "x")


@pytest.fixture
def s3(monkeypatch):
    """A bucket on a server on the loopback."""
    moto_server = pytest.importorskip("moto.server")
    import boto3
    import s3fs

    server = moto_server.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="weights")
    yield "s3://weights"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.s3
def test_weights_on_s3(s3):
    state = network().state_dict()
    save_weights(f"{s3}/a/model.safetensors", state)
    assert equal(load_state(f"{s3}/a/model.safetensors"), state)
    with pytest.raises(UserError, match="no such weights file"):
        load_state(f"{s3}/a/none.safetensors")
    with pytest.raises(UserError, match="none-such-bucket"):
        load_state("s3://none-such-bucket/x")
    assert storage.exists(f"{s3}/a/model.safetensors")


@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision:resnet18"])
def test_hub_out_of_reach_is_said_within_ten_seconds(tmp_path, monkeypatch, arch):
    """No name server, proxies that lead nowhere, or a hub that never answers: all end soon."""
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        # TEST-NET-1 (RFC 5737): nothing answers there, so only our own limit ends the wait.
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"teachers\.a\.weights.*weights: /path/file\.safetensors"):
        load_pretrained(TeacherSpec(arch=arch, weights="pretrained"), 3, "teachers.a")
    assert time.monotonic() - start < 10


def test_pretrained_from_the_local_cache_needs_no_network(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    state = build_network(NetworkSpec(arch="torchvision:shufflenet_v2_x0_5"), 1000, 3, seed=5).state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / weights.url.rsplit("/", 1)[-1])
    found = load_pretrained(TeacherSpec(arch="torchvision:shufflenet_v2_x0_5", weights="pretrained"), 3, "teachers.a")
    assert equal(found.network.state_dict(), state)
    assert (found.num_outputs, found.input_size, found.mean) == (1000, 224, [0.485, 0.456, 0.406])


def test_timm_from_the_local_cache_needs_no_network(tmp_path, monkeypatch):
    import huggingface_hub
    import timm

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    state = timm.create_model("mobilenetv2_050").state_dict()
    repo = timm.models.get_pretrained_cfg("mobilenetv2_050").hf_hub_id
    # The layout of the Hugging Face cache: refs name a revision, snapshots hold its files.
    root = tmp_path / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    safetensors.torch.save_file(state, root / "snapshots" / "abc" / "model.safetensors")
    found = load_pretrained(TeacherSpec(arch="timm:mobilenetv2_050", weights="pretrained"), 3, "teachers.a")
    assert equal(found.network.state_dict(), state)
    assert found.input_size == 224


@pytest.mark.parametrize("arch", ["builtin:resnet18", "timm:resnet10"])
def test_no_pretrained_weights(arch):
    with pytest.raises(UserError, match=r"weights|network"):
        load_pretrained(TeacherSpec(arch=arch, weights="pretrained"), 3, "teachers.a")
