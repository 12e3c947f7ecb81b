"""The race in pipelined loops: found where it is, and only there."""

from __future__ import annotations

import pytest

from gif_kernels.device.races import overwritten_operands

LOOP = """
module {{
  tt.func public @kernel() {{
    %a = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable> loc(#loc1)
    %a0 = ttg.memdesc_index %a[%c0] : !ttg.memdesc<{buffers}x64x64xbf16>
    %t0 = ttg.async_copy_global_to_local %p0, %a0 mask %m : tensor<64x64x!tt.ptr<bf16>>
    %a1 = ttg.memdesc_index %a[%c1] : !ttg.memdesc<{buffers}x64x64xbf16>
    %t1 = ttg.async_copy_global_to_local %p1, %a1 mask %m : tensor<64x64x!tt.ptr<bf16>>
    %r:2 = scf.for %i = %c0 to %n step %c64 iter_args(%acc = %zero, %k = %c1) -> (tensor<64x64xf32>, i32)  : i32 {{
      %x = ttg.memdesc_index %a[%k] : !ttg.memdesc<{buffers}x64x64xbf16>
      %y = ttg.memdesc_trans %x {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16>
      %s = "tt.reduce"(%v) <{{axis = 1 : i32}}> ({{
      ^bb0(%l: f32, %h: f32):
        tt.reduce.return %l : f32
      }}) : (tensor<64x64xf32>) -> tensor<64xf32, #ttg.slice<{{dim = 1, parent = #blocked}}>>
      %d = ttng.warp_group_dot %x, %y, %acc {{isAsync = true}} : !ttg.memdesc<64x64xbf16>
      %w:3 = ttng.warp_group_dot_wait %d, %x, %y {{pendings = {pending} : i32}} : tensor<64x64xf32>
      %z = ttg.memdesc_index %a[%j] : !ttg.memdesc<{buffers}x64x64xbf16>
      %t2 = ttg.async_copy_global_to_local %p2, %z mask %m : tensor<64x64x!tt.ptr<bf16>>
      scf.yield %w#0, %j : tensor<64x64xf32>, i32
    }} loc(#loc2)
    tt.return
  }}
}}
"""


@pytest.mark.parametrize(
    ("buffers", "pending", "found"),
    [(2, 1, ["%a"]), (3, 1, []), (2, 0, [])],
    ids=["a copy two ahead in two buffers", "in three", "no product runs on"],
)
def test_copies_over_what_is_read(buffers, pending, found):
    assert overwritten_operands(LOOP.format(buffers=buffers, pending=pending)) == found


def test_no_products_no_race():
    assert overwritten_operands("module {\n}\n") == []
