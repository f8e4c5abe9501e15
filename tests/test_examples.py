"""The examples are run as they stand: each is short, imports the package alone, and does what it says."""

import ast
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model
from test_losses import make_batch

from layerskip_jax.losses import exit_losses
from layerskip_jax.metrics import read_records

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_examples_are_short_and_import_the_package_alone(file):
    assert len(file.read_text().splitlines()) < 60
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert all(name.split(".")[0] in {"layerskip_jax", "jax", *sys.stdlib_module_names} for name in names)


def settings(corpus, run_dir):
    model = {"num_layers": 4, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": 340}
    values = {f"model.{name}": value for name, value in model.items()}
    values |= {f"data.{name}": getattr(corpus, name) for name in ("source", "path", "tokenizer", "sequence_length")}
    values |= {"train.run_dir": run_dir, "train.steps": 3, "train.loss_chunk": 8, "train.log_every": 1}
    values |= {"train.evaluate_batches": 1, "optimizer.warmup_steps": 1, "early_exit.curriculum": "all"}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_curriculum(corpus, tmp_path):
    example("curriculum").main([*settings(corpus, tmp_path / "run"), "--decode.exits", "2", "3"])
    losses = [
        sorted(name for name in record if name.startswith("train/exit_loss/"))
        for record in read_records(str(tmp_path / "run"))
        if "train/objective" in record
    ]
    assert losses == [[f"train/exit_loss/{exit_layer}" for exit_layer in pair] for pair in ((2, 4), (3, 4), (2, 4))]


def test_draft_policy(trained_run, capsys):
    example("draft_policy").main(["--checkpoint", trained_run, "--prompt", "def x"])
    assert "def x" in capsys.readouterr().out


def test_distillation_trains(corpus, tmp_path):
    example("distillation").main(settings(corpus, tmp_path / "run"))
    assert [record["step"] for record in read_records(str(tmp_path / "run")) if "train/objective" in record] == [
        1,
        2,
        3,
    ]


def test_distillation_is_its_formula_and_has_its_gradient():
    """Against whole logits of every exit: values, and gradients with the teacher held fixed."""
    distilled, last_hidden = (getattr(example("distillation"), name) for name in ("distilled", "last_hidden"))
    model, batch, weight_L = tiny_model(1), make_batch(1), jnp.array([0.0, 0.2, 0.3, 0.5])

    def ours(model):
        guide = last_hidden(jax.lax.stop_gradient(model), batch.inputs_BT, batch.segments_BT)
        return exit_losses(model, batch, weight_L, chunk=4, loss=distilled, guide=guide)

    def plain(model):
        x, log_p = model.embed(batch.inputs_BT), []
        for block in model.unstacked().blocks:
            x = x + block(x, model.positions(jnp.arange(x.shape[1])[None]), batch.segments_BT)[0]
            log_p.append(jax.nn.log_softmax(model.unembed(x)))
        log_p, teacher = jnp.stack(log_p), jax.lax.stop_gradient(log_p[-1])
        picked = jnp.take_along_axis(log_p, jnp.broadcast_to(batch.targets_BT, log_p.shape[:3])[..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(teacher)[None] * (teacher[None] - log_p), -1)
        loss_L = jnp.sum((0.5 * kl - 0.5 * picked) * batch.mask_BT[None], (1, 2))
        return jnp.sum(weight_L * loss_L), loss_L

    (value, loss_L), grads = jax.jit(jax.value_and_grad(lambda m: tuple(ours(m)), has_aux=True))(model)
    (expected, expected_L), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(model)
    np.testing.assert_allclose(loss_L[1:], expected_L[1:], rtol=1e-4)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), grads, expected_grads)
