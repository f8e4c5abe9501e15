"""The short form of benchmarks/soak.py: training and generation in a loop leave nothing behind."""

from functools import partial

from benchmarks.soak import WAYS, after_warm_up, commands, soak, table


def test_no_files_threads_or_programs_are_left_behind(tmp_path):
    turns = soak(tmp_path, seconds=0, kind=partial(commands, ways=WAYS[:1]))
    steady = after_warm_up(turns)
    print(table(turns))
    first, last = steady[0], steady[-1]
    assert {name: last[name] for name in ("files", "python_threads", "programs")} == {
        name: first[name] for name in ("files", "python_threads", "programs")
    }
    # The libraries' pools of threads fill up by and by; a leak would be one a turn at least.
    assert last["threads"] - first["threads"] < len(steady) - 1
