"""Generate: ``python decode.py --checkpoint runs/quickstart --prompt "def "``; ``--help`` lists every setting."""

from layerskip_jax.commands.decode import run

if __name__ == "__main__":
    run()
