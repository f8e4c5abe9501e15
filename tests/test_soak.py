"""The short form of benchmarks/soak.py: training and generation in a loop leave nothing behind."""

from benchmarks.soak import COUNTS, WAYS, after_warm_up, soak, table


def test_no_files_threads_or_programs_are_left_behind(tmp_path):
    turns = soak(tmp_path, seconds=8, ways=WAYS[:1])
    steady = after_warm_up(turns)
    print(table(turns))
    for name in COUNTS:
        if name != "maps":  # they belong to the allocator too
            # Pools of threads fill up by and by, so that a few turns cannot tell growth from a pool: none may go on.
            assert min(turn[name] for turn in steady[-2:]) <= max(turn[name] for turn in steady[:2]), (name, turns)
