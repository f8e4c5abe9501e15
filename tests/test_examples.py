"""Every example is short, imports only this package and JAX, runs unchanged, and does what its docstring says."""

import ast
import dataclasses
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

from layerskip_jax.data.pipeline import local_batches, to_devices
from layerskip_jax.recipe.fused_exit_loss import chunked_exit_losses
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.step import Trainer

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_examples_are_short_and_import_only_the_package_and_jax(file):
    assert len(file.read_text().splitlines()) < 60
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert all(name.split(".")[0] in {"layerskip_jax", "jax", *sys.stdlib_module_names} for name in names)


def train_arguments(name, options, monkeypatch):
    """Run the ``main`` of an example with a stub for `train`; return the arguments of its call."""
    module, calls = example(name), []
    monkeypatch.setattr(module, "train", lambda config, recipe: calls.append((config, recipe)))
    module.main(options)
    return calls[0]


def test_curriculum_and_distillation_train(corpus, monkeypatch):
    """Three steps with the curriculum of one example and the loss of the other, to compile only once."""
    model = {"num_layers": 4, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": VOCABULARY}
    values = {f"model.{key}": value for key, value in model.items()}
    values |= {f"data.{key}": getattr(corpus, key) for key in ("source", "path", "tokenizer", "sequence_length")}
    values |= {"train.steps": 3, "train.loss_chunk": 8, "optimizer.warmup_steps": 1}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    _, own = train_arguments("curriculum", [*words, "--early_exit.curriculum", "all"], monkeypatch)
    config, recipe = train_arguments("distillation", words, monkeypatch)
    mesh = make_mesh(config, jax.devices()[:1])
    trainer, seen = Trainer(config, dataclasses.replace(recipe, curriculum=own.curriculum), mesh), []
    with jax.set_mesh(mesh):
        state = trainer.init()
        for batch in itertools.islice(local_batches(config, "train", mesh), config.train.steps):
            state, metrics = trainer.step(state, to_devices(batch, mesh))
            seen.append(jax.device_get(metrics))
    exits = [(np.flatnonzero(metrics.exit_weight_L) + 1).tolist() for metrics in seen]
    assert exits == [[2, 3, 4], [4], [2, 3, 4]]  # with the paper's weights, exit 1 has none
    assert seen[2].objective < seen[0].objective


def test_draft_policy(trained_run, capsys):
    example("draft_policy").main(["--checkpoint", trained_run, "--prompt", "def x"])
    assert "def x" in capsys.readouterr().out


def test_distillation_is_its_formula():
    """The loss equals the formula on the full logits of every exit, and the teacher gets no gradient."""
    distilled, last_hidden = (getattr(example("distillation"), name) for name in ("distilled", "last_hidden"))
    model, batch = tiny_model(1, num_layers=2), make_batch(1)

    @jax.jit
    def ours(model):
        teacher_arrays = last_hidden(model, batch.inputs_BT, batch.segments_BT)
        return chunked_exit_losses(model, batch, chunk=4, loss=distilled, teacher=teacher_arrays)

    @jax.jit
    def plain(model):
        unstacked = model.unstacked()
        logits = [unstacked.first_layers(exit_layer)(batch.inputs_BT, batch.segments_BT) for exit_layer in (1, 2)]
        return jax.nn.log_softmax(jnp.stack(logits))

    log_p, mask = np.asarray(plain(model)), np.asarray(batch.mask_BT)
    picked = np.take_along_axis(log_p, np.tile(batch.targets_BT, (2, 1, 1))[..., None], -1)[..., 0]
    kl = (np.exp(log_p[-1]) * (log_p[-1] - log_p)).sum(-1)
    np.testing.assert_allclose(ours(model), ((0.5 * kl - 0.5 * picked) * mask).sum((1, 2)), rtol=1e-4)

    x, teacher, targets = log_p[0], log_p[1], batch.targets_BT
    gradient = jax.grad(lambda x, teacher: distilled(lambda x: x, x, targets, batch.mask_BT, teacher), (0, 1))
    student_gradient, teacher_gradient = jax.jit(gradient)(x, teacher)
    assert not teacher_gradient.any()
    wanted = 0.5 * np.exp(log_p[1]) + 0.5 * (np.arange(x.shape[-1]) == np.asarray(targets)[..., None])
    np.testing.assert_allclose(student_gradient, (np.exp(log_p[0]) - wanted) * mask[..., None], atol=1e-5)
