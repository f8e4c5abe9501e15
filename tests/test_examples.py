"""The examples are run as they stand: each is short, imports the package alone, and does what it says."""

import ast
import importlib.util
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from models import tiny_model
from test_losses import make_batch

from layerskip_jax.losses import exit_losses
from layerskip_jax.sharding import make_mesh
from layerskip_jax.train_step import Trainer
from layerskip_jax.training import local_batches, to_devices

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


def three_steps(name, corpus, monkeypatch, *argv):
    """Run an example's ``main``; its call of `train` takes three optimizer steps, on one device."""
    module, seen = example(name), []
    model = {"num_layers": 4, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": VOCABULARY}
    values = {f"model.{key}": value for key, value in model.items()}
    values |= {f"data.{key}": getattr(corpus, key) for key in ("source", "path", "tokenizer", "sequence_length")}
    values |= {"train.steps": 3, "train.loss_chunk": 8, "optimizer.warmup_steps": 1, "early_exit.curriculum": "all"}

    def train(config, recipe):
        mesh = make_mesh(config, jax.devices()[:1])
        trainer = Trainer(config, recipe, mesh)
        with jax.set_mesh(mesh):
            state = trainer.init()
            for batch in itertools.islice(local_batches(config, "train"), config.train.steps):
                state, metrics = trainer.step(state, to_devices(batch, mesh))
                seen.append(jax.device_get(metrics))

    monkeypatch.setattr(module, "train", train)
    module.main([*(word for key, value in values.items() for word in (f"--{key}", str(value))), *argv])
    return seen


def test_curriculum(corpus, monkeypatch):
    seen = three_steps("curriculum", corpus, monkeypatch, "--decode.exits", "2", "3")
    exits = [(np.flatnonzero(metrics.exit_weight_L) + 1).tolist() for metrics in seen]
    assert exits == [[2, 4], [3, 4], [2, 4]]


def test_draft_policy(trained_run, capsys):
    example("draft_policy").main(["--checkpoint", trained_run, "--prompt", "def x"])
    assert "def x" in capsys.readouterr().out


def test_distillation(corpus, monkeypatch):
    seen = three_steps("distillation", corpus, monkeypatch)
    assert all(np.isfinite(metrics.objective) for metrics in seen)
    assert seen[-1].objective < seen[0].objective


def test_distillation_is_its_formula_and_has_its_gradient():
    """Against whole logits of every exit: values, and gradients with the teacher held fixed."""
    distilled, last_hidden = (getattr(example("distillation"), name) for name in ("distilled", "last_hidden"))
    model, batch, weight_L = tiny_model(1, num_layers=2), make_batch(1), jnp.array([0.4, 0.6])

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
    np.testing.assert_allclose(loss_L, expected_L, rtol=1e-4)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), grads, expected_grads)
