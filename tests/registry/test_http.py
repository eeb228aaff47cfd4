"""Decisions of the HTTP layer that need no peer: proxies, retries, certificates."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from balenapy.errors import InvalidParameter
from balenapy.registry.errors import RegistryError
from balenapy.registry.http import RETRY_DELAY_MAX_S, RetryBudget
from balenapy.registry.proxy import proxy_for
from balenapy.registry.tls import tls_context
from tests.registry.real_registry import make_certificate

PROXY = {"HTTP_PROXY": "http://p:1", "https_proxy": "p:2"}


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxy"),
    [
        ("http://h.example/x", "", "http://p:1"),
        ("https://h.example/x", "", "http://p:2"),
        ("http://127.0.0.1:5000/", "", None),
        ("http://localhost/", "", None),
        ("http://[::1]:5/", "", None),
        ("http://h.example/", "h.example", None),
        ("http://a.h.example/", "h.example", None),
        ("http://ah.example/", "h.example", "http://p:1"),
        ("http://h.example/", ".h.example", "http://p:1"),
        ("http://a.h.example/", "x, .h.example", None),
        ("http://a.h.example/", "*.h.example", None),
        ("http://h.example:81/", "h.example:80", "http://p:1"),
        ("http://h.example/", "h.example:80", None),
        ("http://10.1.2.3/", "10.0.0.0/8", None),
        ("http://10.1.2.3/", "10.1.2.3", None),
        ("http://11.1.2.3/", "10.0.0.0/8", "http://p:1"),
        ("http://[fd00::1]/", "fd00::/8", None),
        ("http://h.example/", "*", None),
    ],
)
def test_the_environment_says_which_proxy(url: str, no_proxy: str, proxy: str | None) -> None:
    assert proxy == proxy_for(url, {**PROXY, "NO_PROXY": no_proxy})


def test_delays_double_with_jitter_and_end_with_the_budget() -> None:
    budget = RetryBudget(5, random_unit=lambda: 0.5)
    cut = RegistryError("EOF", retryable=True)

    assert [budget.next_delay(cut) for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, None]


def test_bytes_that_arrive_refill_the_budget() -> None:
    budget = RetryBudget(2)
    cut = RegistryError("EOF", retryable=True)

    for _ in range(10):
        assert budget.next_delay(cut) is not None
        budget.progressed()


def test_jitter_spreads_delays_and_never_comes_before_what_the_registry_asked() -> None:
    early, late = RetryBudget(9, lambda: 0.0), RetryBudget(9, lambda: 1.0)
    asked = RegistryError("", retryable=True, retry_after_s=7)
    unasked = RegistryError("", retryable=True)

    assert early.next_delay(asked) == 7
    assert late.next_delay(asked) == pytest.approx(8.4)
    assert early.next_delay(unasked) == pytest.approx(1.8)
    assert late.next_delay(unasked) == pytest.approx(2.2)


def test_no_retry_for_what_does_not_pass_by_itself() -> None:
    budget = RetryBudget(9)

    assert budget.next_delay(RegistryError("denied: no", code="DENIED")) is None
    assert budget.next_delay(OSError(28, "No space left on device")) is None
    assert budget.next_delay(RegistryError("", retryable=True, retry_after_s=RETRY_DELAY_MAX_S + 1)) is None


def test_a_hosts_directory_adds_authorities_and_client_certificates(tmp_path: Path) -> None:
    made = make_certificate(tmp_path / "made")
    host = tmp_path / "certs.d" / "h:5"
    host.mkdir(parents=True)
    (host / "ca.crt").write_bytes(made.certificate.read_bytes())
    (host / "client.cert").write_bytes(made.certificate.read_bytes())
    (host / "client.key").write_bytes(made.key.read_bytes())
    bare = tmp_path / "no-authorities"
    bare.mkdir()

    context = tls_context(
        "h:5", verify=True, directories=[tmp_path / "certs.d"], environment={"SSL_CERT_DIR": str(bare)}
    )

    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "client.cert",
            "missing key client.key for client certificate client.cert. "
            "Note that CA certificates should use the extension .crt",
        ),
        ("client.key", "missing client certificate client.cert for key client.key"),
        ("broken.crt", "broken.crt: "),
    ],
)
def test_half_a_client_certificate_is_refused_by_name(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / name).write_text("nothing\n")

    with pytest.raises(InvalidParameter) as caught:
        tls_context("h", verify=False, directories=[tmp_path])

    assert problem in caught.value.message


def modules_after(code: str, names: tuple[str, ...]) -> str:
    """Which of these modules a fresh interpreter holds after running the code."""
    program = f"import sys; {code}; print([name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_nothing_is_imported_before_the_first_request() -> None:
    assert modules_after("import balenapy.registry.client", ("httpcore", "h11", "httpx", "zstandard")) == "[]\n"


def test_the_first_request_imports_only_what_is_used() -> None:
    code = "from balenapy.registry.http import _import_httpcore; _import_httpcore()"
    unused = ("httpx", "h2", "anyio", "http.client", "urllib.request", "email", "zstandard", "asyncio", "certifi")

    assert modules_after(code, ("httpcore", *unused)) == "['httpcore']\n"
