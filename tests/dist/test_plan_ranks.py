"""Planning for ranks with real ones: what is chosen, what it then takes, and how ranks fail."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from dist.launch import torchrun
from narrowcast.errors import ParallelError, RecipeError, UsageError
from narrowcast.planning.planner import Planner, plan_recipe
from narrowcast.planning.space import candidates
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps, loads
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import RunRecord

pytestmark = pytest.mark.slow

REGRESSION = Path(__file__).parents[1] / "recipes" / "regression.py"
RANKS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread(module_monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the cores with other tests, and no wait is long."""
    module_monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module_monkeypatch.setenv("NARROWCAST_WAIT_S", "120")


@pytest.fixture(scope="module")
def module_monkeypatch() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of a GPT of two blocks, with its batch whole."""
    recipe = load_recipe("austen")
    return Planner(recipe, device="cpu", world=RANKS, precisions=["fp32"], keep_batch=True)


def least(planner: Planner, kind: str) -> int:
    """The smallest peak that any plan of this way to share is predicted to have."""
    way = planner.ways[kind]
    return min(way.peaks.need(plan).bytes for plan in candidates(way.space))


@pytest.fixture(scope="module")
def tight(planner: Planner) -> PlanRecord:
    """A plan for what DDP cannot do with."""
    return planner.plan(least(planner, "ddp") - 1)


def test_where_whole_weights_do_not_fit_they_are_cut(planner: Planner, tight: PlanRecord) -> None:
    """The record says which way was chosen, and what is known of the other."""
    assert least(planner, "fsdp2") < tight.budget_bytes
    assert tight.chosen.parallel == "fsdp2"
    assert tight.chosen.speed == "measured"
    assert tight.chosen.predicted_bytes <= tight.budget_bytes
    assert tight.chosen.measured_bytes is not None
    assert tight.chosen.measured_bytes <= tight.budget_bytes
    assert "by ddp nothing " in tight.why
    assert tight.effects[-1].choice == "fsdp2 on 2 ranks"
    assert all(point.parallel for point in tight.frontier)
    assert loads(PlanRecord, dumps(tight)) == tight


def test_the_command_trains_within_the_budget(tight: PlanRecord, tmp_path: Path) -> None:
    """Of two ranks, gloo may have let one hold what it sent for longer: the lesser is compared."""
    file, place = tmp_path / "plan.json", tmp_path / "run"
    file.write_text(dumps(tight))
    words = tight.command.split()
    assert words[:4] == ["torchrun", "--nproc-per-node", "2", "-m"]
    asked = [str(file) if word == "plan.json" else word for word in words[3:]]

    ended = torchrun(RANKS, *asked, "--steps", "4", "--device", "cpu", "--output", str(place))

    assert ended.code == 0, ended.stderr[-2000:]
    record = loads(RunRecord, (place / "run.json").read_text())
    assert (record.parallel, record.ranks) == ("fsdp2", RANKS)
    assert record.plan == tight.chosen.plan
    assert record.budget_bytes == tight.budget_bytes
    assert min(record.rank_peak_bytes) <= tight.budget_bytes
    assert not any("was found for" in note for note in record.warnings)


def test_on_another_number_of_ranks_the_promise_is_not_made(
    tight: PlanRecord, tmp_path: Path
) -> None:
    """One process, as torchrun was forgotten: a note says for what the plan was found."""
    file, place = tmp_path / "plan.json", tmp_path / "run"
    file.write_text(dumps(tight))

    words = ("-m", "narrowcast", "train", "austen", "--device", "cpu", "--steps", "4")
    ended = torchrun(1, *words, "--plan", str(file), "--output", str(place))

    assert ended.code == 0, ended.stderr[-2000:]
    (note,) = [n for n in json.loads((place / "run.json").read_text())["warnings"] if "found" in n]
    assert "was found for fsdp2 on 2 ranks, and this is one process" in note


def test_with_room_for_all_what_is_faster_is_chosen(planner: Planner) -> None:
    """Of all that was measured none is faster than the choice, but for the noise."""
    record = planner.plan(2**30)

    measured = [point.seconds for point in record.frontier if point.speed == "measured"]
    assert record.chosen.speed == "measured"
    assert record.chosen.seconds <= min(measured) * (1 + record.noise)
    assert {"ddp", "fsdp2"} == set(planner.ways)


def test_measured_peaks_of_ranks_are_the_predicted_ones(planner: Planner) -> None:
    """To 2 %, as predictions of ranks are; some may be more, by what gloo did not let go of."""
    seen = [c for c in planner._known.values() if c.measured_bytes is not None]

    assert seen
    ratios = [(c.measured_bytes or 0) / c.bytes for c in seen]
    assert min(ratios) >= 0.98
    assert median(ratios) <= 1.02


def test_an_impossible_budget_names_what_a_rank_takes(planner: Planner) -> None:
    """Measured on ranks, with the way to share; given that much, it is met."""
    with pytest.raises(UsageError, match=r"on each of 2 ranks.*measured.* by fsdp2") as raised:
        planner.plan(1000)

    least = int(raised.value.message.rpartition("(")[2].split(" ")[0].replace(",", ""))
    assert planner.plan(least).chosen.parallel == "fsdp2"


def failing(tmp_path: Path, how: str) -> Path:
    """A recipe of which rank 1 alone does something else at its third loss."""
    file = tmp_path / "failing.py"
    file.write_text(
        f"import os\nimport signal\n{REGRESSION.read_text()}\n\n"
        "right, passes = loss, []\n\n\n"
        "def loss(model, batch):\n"
        "    passes.append(1)\n"
        "    if os.environ.get('RANK') == '1' and len(passes) == 3:\n"
        f"        {how}\n"
        "    return right(model, batch)\n"
    )
    return file


def test_a_recipe_that_fails_on_a_rank_says_so_in_its_own_words(tmp_path: Path) -> None:
    """Nobody waits for ever, and the error is the recipe's; both ways to share fail alike."""
    file = failing(tmp_path, "raise ValueError('the cat is on the keyboard')")

    with pytest.raises(RecipeError, match=r"rank 1: .*the cat is on the keyboard"):
        plan_recipe(file, 2**30, device="cpu", world=RANKS, precisions=["fp32"])


def test_a_rank_that_is_killed_is_told(tmp_path: Path) -> None:
    """By the one that is left, or by the planner."""
    file = failing(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")

    with pytest.raises(ParallelError, match=r"lost its connection|left no word"):
        plan_recipe(file, 2**30, device="cpu", world=RANKS, parallel="ddp", precisions=["fp32"])
