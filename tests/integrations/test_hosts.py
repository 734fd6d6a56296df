"""Hosts are imported when asked for; whoever lacks one is told what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from narrowcast.errors import UsageError
from narrowcast.integrations.accelerate import attach
from narrowcast.integrations.hosts import first_host, host_module, mixed_class
from narrowcast.integrations.lightning import fabric_precision, trainer_precision
from narrowcast.integrations.transformers import attach as attach_to_trainer

HOSTS = ("lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "transformers")
ADAPTERS = ("lightning", "accelerate", "transformers", "trackers")


def test_importing_an_adapter_imports_no_host() -> None:
    """The four adapters load where none of the hosts is installed."""
    adapters = ", ".join(f"narrowcast.integrations.{name}" for name in ADAPTERS)
    code = f"import sys, {adapters}; print([m for m in {HOSTS} if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("ask", "package"),
    [
        (lambda: trainer_precision("fp32", device="cpu"), "lightning"),
        (lambda: fabric_precision("fp32", device="cpu"), "lightning"),
        (lambda: attach(None, "fp32"), "accelerate"),
        (lambda: attach_to_trainer(None, "fp32"), r"transformers\[torch\]"),
    ],
)
def test_a_missing_host_is_named_with_its_package(
    ask: object, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error: what could not be imported, and the pip command."""
    for name in [n for n in sys.modules if n.partition(".")[0] in HOSTS] + list(HOSTS):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(UsageError, match=f"pip install {package}"):
        ask()  # type: ignore[operator]


def test_the_host_in_use_goes_before_the_one_that_could_be_imported() -> None:
    """Lightning comes under two names; the program's own import decides."""
    names = ("wave", "json")

    assert first_host(names, package="x").__name__ == "json"
    assert host_module("json", package="x") is sys.modules["json"]


def test_a_mixed_class_is_of_the_hosts_kind_with_our_methods() -> None:
    """isinstance holds for both, and ours answers first."""

    class Ours:
        def who(self) -> str:
            return "ours"

    class Theirs:
        def who(self) -> str:
            return "theirs"

    made = mixed_class("Made", Ours, Theirs)()

    assert isinstance(made, Theirs)
    assert made.who() == "ours"
