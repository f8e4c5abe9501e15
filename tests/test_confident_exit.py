"""Exits by confidence, against an oracle without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model

from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.rounds import Autoregressive
from layerskip_jax.decoding.sampling import Greedy

PROMPTS = [[1, 2, 3], [4]]


def confident_oracle(model, prompt, exits, threshold, new_tokens):
    """Early exit without a cache: ``entries[l]`` holds the inputs of block l, constant after a token's exit."""
    # Zeros after the last input: attention is causal, and one length is one program.
    N = len(prompt) + new_tokens
    entries = [np.zeros((N, model.config.dim), np.float32) for _ in range(model.config.num_layers)]
    positions, one_text = model.rotary_tables(jnp.arange(N)[None]), jnp.ones((1, N), int)
    run_block = jax.jit(lambda block, x_TD: block(x_TD[None], positions, one_text)[0][0])
    known, used = list(prompt), []  # tokens, and the exit layer of each new one
    for position in range(len(prompt) + new_tokens - 1):
        x, exited, token = np.asarray(model.embed(jnp.array([[known[position]]])))[0, 0], None, None
        for layer, block in enumerate(model.blocks):
            entries[layer][position] = x
            if exited is None:
                x = x + np.asarray(run_block(block, entries[layer]))[position]
            prefill = position < len(prompt) - 1  # all blocks prefill the prompt
            if exited is None and not prefill and layer + 1 in exits:
                logits = model.unembed(jnp.asarray(x)[None, None])[0, 0]
                if float(jnp.max(jax.nn.softmax(logits))) >= threshold or layer + 1 == model.config.num_layers:
                    exited, token = layer + 1, int(jnp.argmax(logits))
        if exited is not None:
            known.append(token)
            used.append(exited)
    return known[len(prompt) :], used


@pytest.mark.parametrize("threshold", [0.045, 0.06, 0.09])
def test_confident_exit_equals_an_oracle_without_a_cache(threshold):
    model, exits = tiny_model(6).unstacked(), (1, 3, 4)
    prompts = [[3, 1, 4], [9]]
    result = generate(model, prompts, 8, ConfidentExit(Greedy(), exits, threshold))
    expected = [confident_oracle(model, prompt, exits, threshold, 8) for prompt in prompts]
    assert result.tokens == [tokens for tokens, _ in expected]
    used = [exit_layer for _, row in expected for exit_layer in row]
    assert result.exit_rounds == {exit_layer: used.count(exit_layer) for exit_layer in exits}


def test_confident_exit_with_extreme_thresholds():
    model = tiny_model(3).unstacked()
    full = generate(model, PROMPTS, 20, Autoregressive(Greedy()))
    assert generate(model, PROMPTS, 20, ConfidentExit(Greedy(), (1, 2, 4), 1.1)).tokens == full.tokens
    first = generate(model, PROMPTS, 20, ConfidentExit(Greedy(), (2, 4), 0.0))
    assert first.exit_rounds == {2: 40, 4: 0}
