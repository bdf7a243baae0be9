"""Sentences for users hold no secrets."""

from __future__ import annotations

import pickle

import pytest

from cluster.errors import PrismError, RunError, UserError, first_line, redact


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtnFEMI+K7")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("MY_API_KEY", "abcdefgh")
    monkeypatch.setenv("SOME_TOKEN", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("signed with wJalr/XUtnFEMI+K7 by RAY 0123456789abcdef", "signed with *** by RAY ***"),
        ("key abcdefgh", "key ***"),
        ("true, says AKIAEXAMPLE", "true, says AKIAEXAMPLE"),
        ("no /var/run/secrets/token", "no /var/run/secrets/token"),
        ("s3://AKIA:other@bucket/key fails", "s3://***@bucket/key fails"),
        ("s3://AKIA:oth/er@bucket/key fails", "s3://***@bucket/key fails"),
        ("http://proxy:pass@host:8080 fails", "http://***@host:8080 fails"),
        ("s3://bucket/key, me@home", "s3://bucket/key, me@home"),
        ("https://host/key?X-Amz-Signature=abc&X=1 fails", "https://host/key?X-Amz-Signature=***&X=1 fails"),
    ],
)
def test_redact(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize("kind", [PrismError, UserError, RunError])
def test_errors_are_born_without_secrets(kind, monkeypatch):
    error = kind("cannot use 0123456789abcdef")
    assert str(error) == "cannot use ***"
    assert error.args == ("cannot use ***",)
    assert str(pickle.loads(pickle.dumps(error))) == "cannot use ***"


def test_first_line():
    assert first_line(ValueError("bad abcdefgh\nand pages of it")) == "bad ***"
    assert first_line(ValueError()) == "ValueError"
