"""tpu/hlo.py on compiled programs with known FLOPs, and on HLO text as XLA:TPU writes it."""

import jax
import jax.numpy as jnp
import pytest
from hlo import Program, Transfer

LOOP = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %w = bf16[8,8]{1,0} parameter(1)
  %product = bf16[4,8]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%product), source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %next = s32[]{:T(128)} add(%i, %two)
  %copy = bf16[4,8] copy(%done), metadata={op_name="s/copy"}, backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %tuple = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %copy)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %both = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%both), condition=%condition, body=%body
  %y = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %total = bf16[4,8]{1,0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  ROOT %gathered = bf16[16,8]{1,0} all-gather(%total), replica_groups=[2,4]<=[8], dimensions={0}
}
"""


def no_branch(op_name, branches):
    return [0] * branches


def test_a_loop_counts_once_per_iteration():
    """Unrolled by two: a limit of 6 is 3 iterations."""
    work = Program(LOOP).work(no_branch)
    assert work.flops == 3 * 2 * 4 * 8 * 8
    assert work.cycles == 3 * 70
    assert work.operations == {"s/copy": (3 * 70, 0)}
    assert work.received == {
        Transfer("collective-permute", overlapped=True, between_slices=False): 3 * 64,
        Transfer("all-reduce", overlapped=False, between_slices=False): 2 * 64 / 2,
        Transfer("all-gather", overlapped=False, between_slices=False): 3 * 64,
    }


def test_transfers_between_slices_are_separate():
    """Each slice runs this program, and the hosts exchange the data. An all-reduce over 4 receives 2 x 3/4."""
    text = """HloModule m, num_partitions=8

ENTRY %main (x: bf16[512,8]) -> bf16[512,8] {
  %x = bf16[512,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[512,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3,4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[512,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3,4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = (bf16[512,8]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %y = bf16[512,8]{1,0} get-tuple-element(%done), index=0
}
"""  # noqa: E501
    received = Program(text).work(no_branch).received
    assert received == {Transfer("all-reduce", overlapped=True, between_slices=True): 2 * 2 * 512 * 8 * 3 / 4}


@pytest.mark.parametrize("takes", [0, 1])
def test_matmuls_scans_and_conditionals_of_a_compiled_program(takes):
    def f(x, w, on):
        def layer(x, _):
            return jax.lax.cond(on > 0, lambda x: jnp.sin(x @ w), lambda x: x, x), None

        return jax.lax.scan(layer, x, None, length=5)[0] @ w

    arrays = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    text = jax.jit(f).lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    work = Program(text).work(lambda op_name, branches: [1 - takes, takes])
    assert work.flops == 2 * 64 * 32 * 32 * (5 * takes + 1)


def test_a_batched_matmul_counts_once():
    """XLA:TPU turns it into a convolution along the batch, in which each element multiplies only its own kernel."""
    text = """HloModule m

ENTRY %main (x: bf16[12,64,32]) -> bf16[12,64,16] {
  %x = bf16[12,64,32]{2,1,0} parameter(0)
  %w = bf16[12,32,16]{2,1,0} parameter(1)
  ROOT %y = bf16[12,64,16]{2,1,0} convolution(%x, %w), window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0io->0bf
}
"""
    assert Program(text).work(no_branch).flops == 2 * 64 * 32 * 16 * 12


def test_sparse_core_collectives_are_overlapped():
    """They are calls on another thread, whose computation ends with an attribute after the brace."""
    text = """HloModule m, num_partitions=4

%called (x: bf16[8,64]) -> bf16[2,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  ROOT %own = bf16[2,64]{1,0} reduce-scatter(%x), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,64]) -> bf16[2,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %start = ((bf16[8,64]{1,0}), bf16[2,64]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[2,64]{1,0} call-done(%start)
}
"""
    received = Program(text).work(no_branch).received
    assert received == {Transfer("reduce-scatter", overlapped=True, between_slices=False): 2 * 8 * 64 * 3 / 4}


def test_text_that_is_not_a_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("hello")
