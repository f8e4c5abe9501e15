"""``python -m layerskip_jax COMMAND ...`` is the same as the installed command ``layerskip COMMAND ...``."""

from layerskip_jax.commands.layerskip import run

if __name__ == "__main__":
    run()
