"""What ranks tell each other before and beside a process group, with threads in place of ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import DistBackendError, HashStore

from narrowcast.errors import NarrowcastError, ParallelError, RecipeError, UnknownName, UsageError
from narrowcast.parallel.failures import PeerFailed, symptom_in
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.together import together_in
from narrowcast.parallel.world import WAIT_LIMIT, World, world_from

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def meet(*acts: Callable[[Meeting], Any], limit_s: float = 20.0) -> list[Any]:
    """Run one act on each rank; return what each returned or raised."""
    store = HashStore()
    size = len(acts)

    def on(rank: int) -> Any:
        world = World(rank=rank, size=size, address="here", limit_s=limit_s)
        meeting = Meeting(world, store)
        try:
            with meeting.failing_together():
                return acts[rank](meeting)
        except NarrowcastError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on, range(size)))


def agreeing(facts: dict[str, object]) -> Callable[[Meeting], Any]:
    return lambda meeting: meeting.agree(facts)


def raising(error: Exception) -> Callable[[Meeting], Any]:
    def act(meeting: Meeting) -> Any:
        raise error

    return act


def test_ranks_that_want_the_same_go_on() -> None:
    """Nothing is raised on any of them."""
    facts: dict[str, object] = {"plan": "bf16", "steps": 3, "clip": None}

    assert meet(*[agreeing(facts)] * 3) == [None, None, None]


def test_the_rank_that_differs_is_named_by_rank_0_alone() -> None:
    """With both values; the others follow with its exit code."""
    found = meet(agreeing({"plan": "bf16"}), agreeing({"plan": "bf16"}), agreeing({"plan": "fp16"}))

    assert isinstance(found[0], UsageError)
    assert "rank 2" in found[0].message
    assert "plan: 'fp16' there, 'bf16' on rank 0" in found[0].message
    assert [type(each) for each in found[1:]] == [PeerFailed, PeerFailed]
    assert [each.exit_code for each in found] == [2, 2, 2]


def test_a_rank_that_does_not_come_is_named_after_the_limit() -> None:
    """The wait ends, and so do the ranks that came."""
    facts = agreeing({"plan": "bf16"})
    found = meet(facts, facts, lambda meeting: None, limit_s=2.0)

    assert isinstance(found[0], ParallelError)
    assert found[0].message == "rank 2 of 3 did not come within 2 s"
    assert isinstance(found[1], ParallelError)


def test_what_rank_0_chooses_is_chosen_for_all() -> None:
    """Every rank gets rank 0's value, and only rank 0 is asked."""

    def choose(meeting: Meeting) -> str:
        return meeting.from_main("directory", lambda: f"of rank {meeting.world.rank}")

    assert meet(choose, choose) == ["of rank 0", "of rank 0"]


def test_a_rank_that_fails_speaks_and_the_others_are_silent() -> None:
    """Its message names it; whoever waits for it, or loses its connection, follows."""
    own = RecipeError("recipe.py: no")
    lost = RecipeError("recipe.py: loss raised")
    lost.__cause__ = RuntimeError(
        "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"
    )
    found = meet(agreeing({}), raising(own), raising(lost))

    assert found[1] is own
    assert own.message == "rank 1: recipe.py: no"
    for each in (found[0], found[2]):
        assert isinstance(each, PeerFailed)
        assert (each.message, each.exit_code, each.kind) == (
            "rank 1: recipe.py: no",
            4,
            "RecipeError",
        )


def test_an_error_that_all_ranks_share_is_said_once() -> None:
    """By rank 0, as it stands."""

    def fail(meeting: Meeting) -> Any:
        raise UsageError("no such precision")

    found = meet(fail, fail, fail)

    assert type(found[0]) is UsageError
    assert found[0].message == "no such precision"
    assert [type(each) for each in found[1:]] == [PeerFailed, PeerFailed]


def test_a_rank_that_is_lost_without_a_word_is_told_of_once() -> None:
    """Rank 0 says so; another survivor, which hears it, is silent."""

    def lose(meeting: Meeting) -> Any:
        raise RecipeError("loss raised") from RuntimeError("[a.cc:1] Connection closed by peer")

    found = meet(lose, lose, lambda meeting: None)

    assert type(found[0]) is ParallelError
    assert found[0].message.endswith("left no word (connection closed)")
    assert isinstance(found[1], PeerFailed)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("gloo/transport"), ""),
        (RuntimeError("a matrix of 3 x 4"), ""),
        (
            RuntimeError(
                "Got the following error when running the callback: RuntimeError: "
                "[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9\nmore"
            ),
            "connection closed",
        ),
        (
            RuntimeError(
                "[/w/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:45802: Connection "
                "reset by peer. This is typically caused by a remote worker hanging or bugs in the "
                "application. Check the logs of the remote worker before reporting an error. "
                "GLHF! \N{BEACH WITH UMBRELLA}"
            ),
            "connection reset",
        ),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), "no answer"),
        (
            RuntimeError("[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 3000 ms"),
            "no answer from rank 1, 3",
        ),
        (
            DistBackendError("NCCL error in: x.cpp:9, unhandled. And more"),
            "NCCL error in: x.cpp:9, unhandled",
        ),
        (DistBackendError("[x.cpp:3] something new"), "something new"),
    ],
)
def test_a_lost_connection_is_told_from_a_failure(error: Exception, expected: str) -> None:
    """Also where it is the cause of an error of ours."""
    outer = RecipeError("recipe.py: the backward pass raised")
    outer.__cause__ = error

    assert symptom_in(error) == expected
    assert symptom_in(outer) == expected


def test_a_rank_that_is_interrupted_leaves_word() -> None:
    """The others end with the exit code of Ctrl-C, and know that nobody was killed."""

    def stop(meeting: Meeting) -> None:
        with pytest.raises(KeyboardInterrupt), meeting.failing_together():
            raise KeyboardInterrupt

    found = meet(agreeing({}), stop, agreeing({}))

    for each in (found[0], found[2]):
        assert isinstance(each, PeerFailed)
        assert (each.kind, each.exit_code) == ("KeyboardInterrupt", 130)
        assert each.message == "rank 1: interrupted"


def test_what_a_users_own_lines_raise_is_a_failure_whatever_it_says() -> None:
    """A recipe that reads its data over a network may lose a connection of its own."""
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("Connection refused: cannot fetch shard 7")

    assert symptom_in(raised.value) == ""


def test_the_environment_becomes_a_world() -> None:
    """With the limit of all waits."""
    world = world_from({**ENVIRONMENT, "LOCAL_RANK": "0", WAIT_LIMIT: "7"})

    assert world == World(rank=1, size=2, local_rank=0, address="localhost:29500", limit_s=7.0)
    assert not world.is_main


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": ""}, "RANK are not set"),
        ({"RANK": "two"}, "RANK is 'two'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({WAIT_LIMIT: "soon"}, "NARROWCAST_WAIT_S is 'soon'"),
        ({WAIT_LIMIT: "0"}, "NARROWCAST_WAIT_S is '0'"),
    ],
)
def test_an_environment_that_is_no_world_is_refused(change: dict[str, str], said: str) -> None:
    """With the variable and its value."""
    with pytest.raises(UsageError, match=r"torchrun|seconds|ranks") as caught:
        world_from({**ENVIRONMENT, **change})

    assert said in caught.value.message


def test_an_unknown_kind_is_refused_before_anybody_is_waited_for() -> None:
    """The valid ones are listed."""
    with pytest.raises(UnknownName, match="ddp"):
        together_in("dpp", ENVIRONMENT)
