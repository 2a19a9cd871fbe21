from benchmarks.rollout.__main__ import PROMPTS, allowed_tokens, goals


def test_every_goal_is_there_also_unmeasured():
    rows = [goal.row() for goal in goals({}, {})]
    assert len(rows) == 3
    assert all(row["value"] is None and not row["holds"] for row in rows)


def test_goals_hold_by_what_was_measured():
    episodes = {"full_percent": 96.0, "hit_rate_points_off": 2.5, "prompts": PROMPTS}
    assert [goal.holds for goal in goals({"ratio_median": 1.04}, episodes)] == [True, True, False]
    small = episodes | {"prompts": 4}
    assert goals({}, small)[2].value is None


def test_what_the_structure_of_an_episode_allows():
    turns = [
        {"prompt_tokens": 128, "generated_tokens": 70},
        {"prompt_tokens": 230, "generated_tokens": 10},
        {"prompt_tokens": 256, "generated_tokens": 10},
    ]
    # 127 of 128 (the last is computed), 197 of 198 generated so far, 239.
    assert allowed_tokens(turns) == 64 + 192 + 192
