// Accesses whose bank conflicts can be counted by hand.
#pragma once

#include "micro_kernels.cuh"

namespace shrank::micro {

// ---- banks: each by one warp of the two, so that conflicts can be counted by hand

SHRANK_MICRO(matrix_rows_in_one_bank_group) {
  uint32_t fragment[4];
  if (me() >= 32) return;
  for (int i = 0; i < 4; i++) arch::store_shared(arch::dynamic_shared() + me() * 128 + i * 4, 0u);
  arch::sync_warp();
  arch::load_matrices(fragment, arch::dynamic_shared() + me() * 128);
}

SHRANK_MICRO(matrix_rows_side_by_side) {
  uint32_t fragment[4];
  if (me() >= 32) return;
  for (int i = 0; i < 4; i++) arch::store_shared(arch::dynamic_shared() + i * 128 + me() * 4, 0u);
  arch::sync_warp();
  arch::load_matrices(fragment, chunk(me()));
}

SHRANK_MICRO(pairs_side_by_side) {
  if (me() < 32) arch::store_shared(arch::dynamic_shared() + me() * 8, arch::Pack<float, 2>{{1, 2}});
}

SHRANK_MICRO(pairs_with_gaps) {
  if (me() < 32) arch::store_shared(arch::dynamic_shared() + me() * 16, arch::Pack<float, 2>{{1, 2}});
}

SHRANK_MICRO(copies_into_one_bank_group) {
  if (me() < 32) arch::copy_async(arch::dynamic_shared() + me() * 128, p.input, 16);
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
}

}  // namespace shrank::micro
