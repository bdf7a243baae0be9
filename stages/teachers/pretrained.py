"""Weights that timm or torchvision name for an architecture: from the local cache, else from their hub."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import UserError
from stages.teachers.arch import split_arch
from stages.teachers.build import check_arch
from stages.teachers.options import NetworkSpec

# A hub that does not answer within so many seconds is out of reach; the run must say so before 10 s are over.
HUB_DEADLINE_S = 7.0


@dataclass(frozen=True)
class Pretrained:
    """A network with its published weights.

    Attributes:
        network: the network.
        num_outputs: its classes.
        mean, std: normalisation it was trained with; None where it is not for these channels.
        input_size: side it was trained with.
    """

    network: nn.Module
    num_outputs: int
    mean: list[float] | None
    std: list[float] | None
    input_size: int


def load_pretrained(spec: NetworkSpec, channels: int, field: str) -> Pretrained:
    """Build a network with the weights that its library publishes.

    Args:
        spec: a ``timm:`` or ``torchvision:`` architecture.
        channels: of the images.
        field: configuration field for errors.

    Raises:
        UserError: no such weights, or neither in the cache nor the hub in reach.
    """
    check_arch(spec.arch)
    source, name = split_arch(spec.arch)
    if source == "timm":
        return _timm(name, spec, channels, field)
    if source == "torchvision":
        return _torchvision(name, spec, channels, field)
    raise UserError(f"{field}.weights: {spec.arch} has no pretrained weights; give a weights file, or none to train it")


def _timm(name: str, spec: NetworkSpec, channels: int, field: str) -> Pretrained:
    import timm

    config = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None or not config.has_weights:
        raise UserError(f"{field}.weights: timm publishes no weights for {name}; see timm.list_models(pretrained=True)")
    overlay: dict[str, Any] = {}
    if config.hf_hub_id:
        cached = _in_hub_cache(config.hf_hub_id, config.hf_hub_filename)
        if cached:
            overlay = {"file": cached}
        else:
            import huggingface_hub

            _reach(huggingface_hub.constants.ENDPOINT, spec.arch, field)
    elif not _in_torch_cache(str(config.url)):
        _reach(str(config.url), spec.arch, field)
    with _download(spec.arch, field):
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels, **spec.kwargs
        )
    fits = channels == len(config.mean)
    return Pretrained(
        network,
        config.num_classes,
        list(config.mean) if fits else None,
        list(config.std) if fits else None,
        config.input_size[-1],
    )


def _in_hub_cache(repo: str, filename: str | None) -> str | None:
    """Path of the weights in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = repo.partition("@")
    for candidate in [filename] if filename else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(repo, candidate, revision=revision or None)
        if isinstance(found, str):
            return found
    return None


def _torchvision(name: str, spec: NetworkSpec, channels: int, field: str) -> Pretrained:
    import torchvision

    if channels != 3:
        raise UserError(f"{field}.arch: {spec.arch} takes colour images only; use timm, which adapts the first layer")
    known = torchvision.models.get_model_weights(name)
    # Not the library's newest default: the published methods recover from the first version's statistics.
    weights = known.__members__.get("IMAGENET1K_V1") or known.DEFAULT
    if not _in_torch_cache(weights.url):
        _reach(weights.url, spec.arch, field)
    with _download(spec.arch, field):
        network = torchvision.models.get_model(name, weights=weights, progress=False, **spec.kwargs)
    transform = weights.transforms()
    return Pretrained(
        network,
        len(weights.meta["categories"]),
        list(transform.mean),
        list(transform.std),
        transform.crop_size[0],
    )


def _in_torch_cache(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()


def _reach(url: str, arch: str, field: str) -> None:
    """Whether the hub answers at all.

    In a thread, because looking a name up has no time limit of its own.
    """
    reason: list[str] = ["no answer"]

    def ask() -> None:
        try:
            with contextlib.closing(
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_DEADLINE_S)
            ):
                reason.clear()
        except urllib.error.HTTPError:
            reason.clear()  # an answer, if a refusal; the download itself will say more
        except Exception as error:
            reason[:] = [str(getattr(error, "reason", error))]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_DEADLINE_S)
    if reason:
        raise _unreachable(arch, field, reason[0])


@contextlib.contextmanager
def _download(arch: str, field: str) -> Any:
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _unreachable(arch, field, lines[0]) from None


def _unreachable(arch: str, field: str, reason: str) -> UserError:
    return UserError(
        f"{field}.weights: the pretrained weights of {arch} are not in the local cache and could not be had from the "
        f"hub ({reason}); download them on a machine with a network and give the file: "
        "`weights: /path/file.safetensors`"
    )
