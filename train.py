"""Pretrain with LayerSkip: ``python train.py --config configs/quickstart.py``; ``--help`` lists every setting."""

from layerskip_jax.commands.train import run

if __name__ == "__main__":
    run()
