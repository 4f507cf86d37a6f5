"""What the report draws of a PPO run."""

import json

import pytest

from instructlite.evaluation.curves import means, sparkline, training_of
from instructlite.models.manifest import Adapter, Manifest


def adapter_with(tmp_path, rows) -> Adapter:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps({"metrics": {"health": {"x": "why"}}}), encoding="utf-8")
    return Adapter(tmp_path, Manifest("policy", "tiny", None, "", "none", "float32", "", ""))


def test_curves_are_those_of_metrics_jsonl_without_what_was_not_measured(tmp_path):
    rows = [{"step": 1, "objective/score": 1.0, "objective/kl": None}, {"step": 2, "loss": 3.0}, {"step": 5, "objective/score": 2.0}]
    found = training_of("ppo", adapter_with(tmp_path, rows))
    assert found == {"candidate": "ppo", "cycles": 2, "curves": {"objective/score": [1.0, 2.0]}, "health": {"x": "why"}}


def test_what_is_not_ppo_has_none(tmp_path):
    assert training_of("sft", adapter_with(tmp_path, [{"loss": 1.0}])) is None
    (tmp_path / "metrics.jsonl").unlink()
    assert training_of("sft", Adapter.load(adapter_with(tmp_path, []))) is None


@pytest.mark.parametrize(("count", "points"), [(1, 1), (7, 7), (40, 40), (41, 40), (1000, 40)])
def test_long_runs_are_shortened_by_means_of_neighbours(count, points):
    short = means(list(range(count)), 40)
    assert len(short) == points and short == sorted(short)
    assert means([2.0] * count, 40) == [2.0] * points


def test_a_sparkline_goes_from_the_least_to_the_greatest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, -5.0]) == "█▁" and sparkline([3.0, 3.0]) == "▄▄"
