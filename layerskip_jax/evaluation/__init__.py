"""Evaluation of every exit: held-out loss, agreement with the last exit, tasks, lm-eval-harness."""
