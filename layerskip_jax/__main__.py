"""``python -m layerskip_jax COMMAND ...`` is the installed command ``layerskip``."""

from layerskip_jax.commands.layerskip import run

if __name__ == "__main__":
    run()
