"""What a model is worth at each exit: held-out loss, agreement with the last exit, tasks, lm-eval-harness."""
