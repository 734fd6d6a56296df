"""The first Ctrl-C is a request, the second one an end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast import compiling
from narrowcast.errors import UsageError
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.training.interruption import Interruption
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"
CHILD_DIED = RuntimeError("a process of the pool was terminated abruptly")


def listening() -> AbstractContextManager[None]:
    return Interruption().listening()


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk() -> None:
    ask()
    raise OSError("the disk is full")


def test_the_first_signal_only_asks() -> None:
    """The block goes on, and knows."""
    interruption = Interruption()

    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)

        assert interruption.requested


def test_the_second_signal_ends_the_block() -> None:
    """Whichever of the two it is."""
    interruption = Interruption()

    with interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_callers_handlers_come_back() -> None:
    """After the block Ctrl-C is what it was before."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    with listening():
        inside = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert inside != before


def failing_backend(*, asked: bool) -> Callable[..., Any]:
    """Return a compiler whose own processes die: of the signal that we got, or of themselves."""

    def backend(*_: object) -> Any:
        if asked:
            ask()
        raise CHILD_DIED

    return backend


def test_a_compilation_that_a_signal_broke_off_is_an_interruption() -> None:
    """Forward; torch's own error of it stays attached."""
    model = torch.compile(nn.Linear(2, 2), backend=failing_backend(asked=True))

    with pytest.raises(KeyboardInterrupt, match="a signal broke off") as caught, listening():
        model(torch.ones(1, 2))

    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.slow
def test_so_is_a_compilation_of_the_backward_pass() -> None:
    """Inductor compiles it when it is run for the first time."""
    from torch._inductor.compile_fx import compile_fx

    def inner(graph: Any, *_: object, **named: Any) -> Any:
        return failing_backend(asked=True)() if named.get("is_backward") else graph.forward

    def inductor(graph: Any, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    model = torch.compile(nn.Linear(2, 2), backend=inductor)
    with pytest.raises(KeyboardInterrupt), listening():
        model(torch.ones(1, 2)).sum().backward()


def test_a_compilation_that_fails_without_a_signal_is_an_error() -> None:
    """As it would be in any other block."""
    model = torch.compile(nn.Linear(2, 2), backend=failing_backend(asked=False))

    with pytest.raises(RuntimeError, match="terminated abruptly"), listening():
        model(torch.ones(1, 2))


def test_another_error_after_a_signal_stays_what_it_is() -> None:
    """A disk that is full while the run saves itself is not to be lost."""
    with pytest.raises(OSError, match="full"), listening():
        fill_the_disk()


def test_a_run_whose_compilation_was_broken_off_is_interrupted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says what broke; without a signal the same failure is an error of the run."""
    real = compiling._compiler

    def run(backend: Any, *, resume: bool = False) -> Any:
        monkeypatch.setattr(compiling, "_compiler", backend)
        options = TrainOptions(compile="aot_eager", measure=False)
        recipe, plan = load_recipe(SMALL), plan_named("bf16")
        cpu = torch.device("cpu")
        return train(recipe, plan, options, tmp_path, device=cpu, resume=resume)

    with pytest.raises(KeyboardInterrupt):
        run(lambda _: failing_backend(asked=True))
    stopped = RunDirectory(tmp_path).read_record()
    with pytest.raises(UsageError, match="could not compile"):
        run(lambda _: failing_backend(asked=False), resume=True)
    failed = RunDirectory(tmp_path).read_record()
    finished = run(real, resume=True)

    assert (stopped.status, stopped.failure) == ("interrupted", "")
    assert stopped.warnings[-1].startswith("a signal broke off torch.compile: aot_eager could not")
    assert (failed.status, failed.failure_kind) == ("failed", "UsageError")
    assert finished.status == "finished"
