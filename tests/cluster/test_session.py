"""How a session is reached: whether a token is asked for, and why one cannot be."""

from __future__ import annotations

import os
import socket

import pytest
import ray
from ray._private.utils import check_version_info

from cluster.resources import SessionOptions
from cluster.session import _auth_mode, _unreachable, configure_data

TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.mark.parametrize(
    ("address", "given", "mode"),
    [
        (None, {}, "disabled"),
        # A token for some cluster in the user's environment says nothing about a private one.
        (None, {"RAY_AUTH_TOKEN_PATH": "/somewhere"}, "disabled"),
        (None, {"RAY_AUTH_MODE": "token"}, "token"),
        ("10.0.0.1:6379", {}, None),
        ("10.0.0.1:6379", {"RAY_AUTH_TOKEN_PATH": "/somewhere"}, "token"),
        ("10.0.0.1:6379", {"RAY_AUTH_TOKEN": "secret"}, "token"),
        ("auto", {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_MODE": "disabled"}, "disabled"),
    ],
)
def test_the_users_environment_decides_about_a_token(address, given, mode, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with _auth_mode(address):
        assert os.environ.get("RAY_AUTH_MODE") == mode
    assert {name: os.environ[name] for name in TOKENS if name in os.environ} == given


def test_other_versions_are_named() -> None:
    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.41.0", "python_version": "3.9.1"}, "node 10.0.0.1")
    words = _unreachable("10.0.0.1:6379", caught.value)
    assert words.startswith(
        "resources.session.address: the cluster at 10.0.0.1:6379 runs Ray 2.41.0 and Python 3.9.1, "
        f"this command Ray {ray.__version__} and Python "
    )
    assert words.endswith("; install the same versions in both places")


def test_a_refused_token_and_silence_are_told_apart() -> None:
    """Ray says the same of both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        error = ConnectionError(f"Failed to connect to Ray cluster at 127.0.0.1:{port}\nmany\nlines")
        refused = _unreachable("auto", error)
    assert refused == (
        "resources.session.address: the cluster at auto refuses this command, most likely for want of its token; set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the token that `ray get-auth-token` shows on "
        "its head"
    )
    assert _unreachable("auto", ray.exceptions.AuthenticationError("Token mismatch")) == refused
    assert _unreachable("auto", error) == (
        "resources.session.address: no Ray cluster answers at auto "
        f"(Failed to connect to Ray cluster at 127.0.0.1:{port}); "
        "start one or leave the field out for a private session"
    )


def test_no_progress_may_be_allowed_for_ever() -> None:
    context = ray.data.DataContext.get_current()
    before = context.execution_no_progress_timeout_s
    try:
        configure_data(SessionOptions(no_progress_timeout_s=None))
        assert context.execution_no_progress_timeout_s == -1
        configure_data(SessionOptions())
        assert context.execution_no_progress_timeout_s == 12 * 3600
    finally:
        context.execution_no_progress_timeout_s = before
