// c (M, N) = a (M, K) b (N, K)^T as kernels for sm_90a do it: a warp that only starts copies, four that only multiply,
// and a ring of slots between them. And the same with a mistake in it, for the emulator to find.
#pragma once

#include "../../../csrc/arch/position.cuh"
#include "../../../csrc/arch/sync.cuh"
#include "../../../csrc/arch/warpgroup.cuh"

namespace shrank::tests {

enum class Mistake {
  none,
  no_barrier_fence,      // the copies may find barriers that are not made yet
  no_sync_after_init,    // and so may the threads
  wrong_parity,          // the copying warp waits for a phase that never ends
  no_wait_for_empty,     // it does not wait until a slot has been read
  too_few_bytes,         // the phase ends before the second tile is there
  no_wait_for_full,      // the multiplying warps do not wait for the tiles
  wrong_column_step,     // the operand b moves on by 8 columns, not 16
  early_release,         // the slot is given back before its products are done
};

struct ProductParams {
  arch::TensorMap a, b;  // tiles of 64 rows and 64 columns
  void* c;
  int M, N, K;
};

template <typename T, Mistake MISTAKE = Mistake::none> struct TiledProduct {
  using Params = ProductParams;
  static constexpr int kTile = 64, kStages = 3, kTileBytes = kTile * 128, kSlotBytes = 2 * kTileBytes;
  static constexpr int kWarps = 4, kThreads = (kWarps + 1) * arch::kWarpSize;
  static constexpr int kFull = kStages * kSlotBytes, kEmpty = kFull + kStages * 8;
  static constexpr int kSharedBytes = kEmpty + kStages * 8;

  SHRANK_DEVICE static bool has(Mistake mistake) { return MISTAKE == mistake; }
  SHRANK_DEVICE static uint32_t parity(int step) { return static_cast<uint32_t>(step / kStages % 2); }

  SHRANK_DEVICE static void run(const Params& params) {
#ifdef SHRANK_HOPPER
    const arch::SharedAddress shared = arch::dynamic_shared();
    const int steps = (params.K + kTile - 1) / kTile;
    if (arch::thread_index() == 0) {
      for (int i = 0; i < kStages; i++) {
        arch::init_barrier(shared + kFull + i * 8, 1);
        arch::init_barrier(shared + kEmpty + i * 8, kWarps);
      }
      if (!has(Mistake::no_barrier_fence)) arch::fence_barrier_init();
    }
    if (!has(Mistake::no_sync_after_init)) arch::sync_threads();
    if (arch::warp_index() < kWarps) multiply(params, shared, steps);
    else if (arch::lane_index() == 0) copy(params, shared, steps);
#endif
  }

  SHRANK_DEVICE static void copy(const Params& params, arch::SharedAddress shared, int steps) {
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages;
      const arch::SharedAddress slot = shared + stage * kSlotBytes, full = shared + kFull + stage * 8;
      if (!has(Mistake::no_wait_for_empty)) {
        const uint32_t before = parity(step) ^ 1;
        arch::await_barrier(shared + kEmpty + stage * 8, has(Mistake::wrong_parity) ? before ^ 1 : before);
      }
      arch::arrive_expecting(full, has(Mistake::too_few_bytes) ? kTileBytes : kSlotBytes);
      arch::copy_tile_async(slot, params.a, step * kTile, arch::block_y() * kTile, full);
      arch::copy_tile_async(slot + kTileBytes, params.b, step * kTile, arch::block_x() * kTile, full);
    }
  }

  SHRANK_DEVICE static void multiply(const Params& params, arch::SharedAddress shared, int steps) {
    float sum[kTile / 2] = {};
    const auto release = [&](arch::SharedAddress empty) {
      if (arch::lane_index() == 0) arch::arrive(empty);
    };
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages;
      const arch::SharedAddress slot = shared + stage * kSlotBytes, empty = shared + kEmpty + stage * 8;
      if (!has(Mistake::no_wait_for_full)) arch::await_barrier(shared + kFull + stage * 8, parity(step));
      arch::warpgroup_fence(sum);
#pragma unroll
      for (int k = 0; k < kTile / 16; k++) {
        const int b_step = has(Mistake::wrong_column_step) ? 16 : 32;
        arch::warpgroup_multiply_add<T, kTile>(sum, arch::operand_at(slot + k * 32),
                                               arch::operand_at(slot + kTileBytes + k * b_step));
      }
      arch::warpgroup_commit();
      if (has(Mistake::early_release)) release(empty);
      arch::warpgroup_wait<0>(sum);
      if (!has(Mistake::early_release)) release(empty);
    }
    save(params, sum);
  }

  SHRANK_DEVICE static void save(const Params& params, const float (&sum)[kTile / 2]) {
    const int lane = arch::lane_index();
    const int row = arch::block_y() * kTile + arch::warp_index() * 16 + lane / 4;
    const int column = arch::block_x() * kTile + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTile / 4; i++) {
      const int m = row + i % 2 * 8, n = column + i / 2 * 8;
      if (m >= params.M || n >= params.N) continue;
      const arch::Pack<uint32_t, 1> pair{{arch::round_to_pair<T>(sum[i * 2], sum[i * 2 + 1])}};
      arch::store(static_cast<uint32_t*>(params.c) + (static_cast<int64_t>(m) * params.N + n) / 2, pair);
    }
  }
};

}  // namespace shrank::tests
