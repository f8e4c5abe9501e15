"""Pretrain with LayerSkip: ``python train.py --config configs/quickstart.py``; ``--help`` lists every setting."""

from layerskip_jax.commands.train import main
from layerskip_jax.errors import run_command

if __name__ == "__main__":
    run_command(main)
