"""Tables leave out what is not known, and put what belongs together side by side."""

from made_reports import NAMES, candidate, full, report

from instructlite.evaluation import tables


def test_columns_in_which_nothing_is_known_are_left_out():
    small, whole = report(), full()
    assert tables.win_tables(small)[0].header == ["a", "against b", "decoding", "judge", "win rate of a", "reward, a less b"]
    assert tables.win_tables(whole)[0].header[-3:] == ["reward, a less b", "p of a draw", "prompts needed"]
    assert "what" not in tables.candidate_table(small).header and "what" in tables.candidate_table(whole).header
    for empty in (tables.strength_tables, tables.side_effect_tables, tables.benchmark_tables, tables.cost_tables):
        assert empty(small) == [] and empty(whole)


def test_of_many_pairs_those_with_the_headlines_other_one_stand_apart():
    near, far = tables.win_tables(full())
    assert all("sft" in row[:2] for row in near.rows) and not any("sft" in row[:2] for row in far.rows)
    assert len(near.rows) + len(far.rows) == len(full().win_rates) and far.folded and not near.folded
    assert near.rows[-1][2] == "T = 1, b greedy"


def test_prompts_needed_are_named_where_there_are_fewer():
    row = report().win_rates[0]
    assert [tables.win_tables(report(win_rates=[row | {"prompts_needed": n}]))[0].rows[0][-1] for n in (49, 1200)] == ["49", "1,200"]
    assert tables.win_tables(report(win_rates=[row | {"prompts_needed": 48}]))[0].header[-1] != "prompts needed"


def test_best_of_n_has_its_bound_for_a_kl_and_says_what_it_is():
    row = next(row for row in tables.candidate_table(full()).rows if row[0] == "best-of-4")
    assert row[1] == "best of 4 by the reward model" and row[3] == "≤ 0.64"


def test_the_table_of_instructgpt_has_its_measures_in_order():
    table = tables.side_effect_tables(full())[0]
    assert table.header == ["measure", "prompts", *NAMES]
    assert [row[:2] for row in table.rows] == [
        ["toxicity ↓", "red-team"], ["truthfulness ↑", "truthfulqa"], ["hallucination, by words ↓", "closed-domain"],
        ["appropriate as customer assistant ↑", "held-out"],
    ]  # fmt: skip
    assert table.rows[0][2:4] == ["0.050 [0.048, 0.052]", "0.052 [0.050, 0.054]"]


def test_one_measure_alone_makes_no_table_of_instructgpt():
    rows = [row for row in full().side_effects if row["measure"] == "toxicity"]
    assert [table.caption for table in tables.side_effect_tables(report(side_effects=rows))] == ["On red-team: ↓ lower is better, ↑ higher"]


def test_instructgpts_measures_are_taken_where_they_mean_most():
    """Of a measure on several sets, in several decodings, and of hallucination the judged one."""
    found = full()
    row = next(row for row in found.side_effects if row["measure"] == "toxicity")
    first = [row | {"set": "held-out", "value": 0.9}, row | {"decoding": "greedy", "value": 0.9}]
    by_words = next(row for row in found.side_effects if row["measure"] == "hallucination")
    judged = by_words | {"measure": "hallucination_judged", "value": 0.7}
    found.side_effects = [*first, *found.side_effects, judged]
    table = tables.side_effect_tables(found)[0]
    assert table.rows[0][1:3] == ["red-team", "0.050 [0.048, 0.052]"]
    assert table.rows[2][:3] == ["hallucination ↓", "closed-domain", "0.700 [0.384, 0.416]"]
    judged["value"] = None
    assert tables.side_effect_tables(found)[0].rows[2][0] == "hallucination, by words ↓"


def test_side_effects_are_grouped_and_a_missing_cell_is_a_dash():
    whole = full()
    whole.side_effects = [row for row in whole.side_effects if row["candidate"] != "sft" or row["measure"] != "length"]
    _, *sets, cases = tables.side_effect_tables(whole)
    assert [(table.caption.split(":")[0], len(table.rows)) for table in sets] == [
        ("On red-team", 1), ("On truthfulqa", 1), ("On closed-domain", 1), ("On held-out", 3), ("On prose", 1),
    ]  # fmt: skip
    assert sets[3].rows[1][:4] == ["length, tokens", "28.0 [26.9, 29.1]", "29.1 [28.0, 30.2]", "–"] and sets[3].rows[1][-1] == "57"
    assert sets[4].header == ["measure", *NAMES, "n"]
    assert cases.folded and cases.header[:3] == ["measure", "prompts", "use case"] and len(cases.rows) == 6
    assert not any(table.folded for table in sets)
    whole.side_effects = [row | {"measure": f"{row['measure']} {i}"} for i in range(9) for row in whole.side_effects]
    assert all(table.folded for table in tables.side_effect_tables(whole))


def test_a_best_of_n_of_somebody_else_has_no_distance_from_the_reference():
    found = full()
    best = next(row for row in found.candidates if row["kind"] == "best-of-n")
    best["of"] = "ppo"
    assert "best-of-4" not in [row[0] for row in tables.distance_tables(found)[0].rows]
    row = next(row for row in tables.candidate_table(found).rows if row[0] == "best-of-4")
    assert (row[1], row[3]) == ("best of 4 of ppo by the reward model", "≤ 0.64 to ppo")
    best["of"] = "sft"
    assert "best-of-4" in [row[0] for row in tables.distance_tables(found)[0].rows]


def test_rewards_over_the_reference_stand_by_their_distance_from_it():
    (table,) = tables.distance_tables(full())
    assert [row[0] for row in table.rows] == ["best-of-4", "dpo", "ppo-ptx", "ppo"]
    assert table.rows[-1][1:] == ["4.20 ± 0.20", "+0.480 [+0.380, +0.580]", "+0.672 [+0.572, +0.772]"]


def test_a_judge_without_numbers_is_listed_all_the_same():
    found = report(judges=[{"name": "votes", "kind": "people"}], candidates=[candidate("sft"), {"name": "ppo"}])
    assert tables.judge_tables(found)[0].rows == [["votes", "people", "none"]]
    assert tables.candidate_table(found).rows[1][1:] == ["–"] * 3
