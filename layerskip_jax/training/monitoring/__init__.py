"""Progress, metrics, goodput, FLOPs, profiles and the hang watchdog of a run."""
