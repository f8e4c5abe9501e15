"""Progress bar, metrics, goodput, FLOP counts, profiler and hang watchdog of a run."""
