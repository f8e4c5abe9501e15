"""Generate: ``python decode.py --checkpoint runs/quickstart --prompt "def "``; ``--help`` lists every setting."""

from layerskip_jax.commands.decode import main
from layerskip_jax.errors import run_command

if __name__ == "__main__":
    run_command(main)
