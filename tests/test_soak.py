"""The short form of benchmarks/soak.py: training and generation in a loop do not leak."""

from functools import partial

from benchmarks.soak import DECODE_OPTIONS, after_warm_up, commands, soak, table


def test_no_files_threads_or_programs_leak(tmp_path):
    rows = soak(tmp_path, seconds=0, kind=partial(commands, options=DECODE_OPTIONS[:1]))
    steady = after_warm_up(rows)
    print(table(rows))
    first, last = steady[0], steady[-1]
    assert {name: last[name] for name in ("files", "python_threads", "programs")} == {
        name: first[name] for name in ("files", "python_threads", "programs")
    }
    # Thread pools of the libraries fill up slowly; a leak would add at least one thread per iteration.
    assert last["threads"] - first["threads"] < len(steady) - 1
