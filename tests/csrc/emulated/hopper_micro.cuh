// Small kernels over arch/hopper.cuh and arch/warpgroup.cuh, each with at most one mistake.
#pragma once

#include "../../../csrc/arch/position.cuh"
#include "../../../csrc/arch/sync.cuh"
#include "../../../csrc/arch/warpgroup.cuh"

namespace shrank::tests {

struct HopperMicroParams {
  arch::TensorMap map;  // of the input: 64 rows, 64 columns, tiles of as many
  const uint32_t* input;
  float* output;
};

enum class Slip {
  none,
  no_proxy_fence,        // the operand's stores may not have reached the products
  proxy_fence_too_soon,  // one store comes after it
  no_warpgroup_fence,
  read_before_wait,
  never_awaited,
  never_committed,
  stored_while_read,     // the operand is overwritten before the products are done
  one_warp_differs,
  one_warp_less,
  unswizzled_operand,
};

// sum = a a^T of a (64, 64) matrix that threads store; the first sum of each thread goes out.
template <Slip SLIP> struct StoredProduct {
  using Params = HopperMicroParams;
  static constexpr int kThreads = 128, kSharedBytes = 64 * 128;

  SHRANK_DEVICE static bool has(Slip slip) { return SLIP == slip; }

  SHRANK_DEVICE static void store(arch::SharedAddress operand, const uint32_t* input) {
    for (int i = arch::thread_index(); i < 64 * 32; i += kThreads) {
      if (has(Slip::proxy_fence_too_soon) && i + kThreads >= 64 * 32) arch::fence_async_proxy();
      const int row = i / 32, chunk = i % 32 / 4;
      arch::store_shared(operand + row * 128 + (chunk ^ row % 8) * 16 + i % 4 * 4, input[i]);
    }
  }

  SHRANK_DEVICE static void run(const Params& params) {
    const arch::SharedAddress operand = arch::dynamic_shared();
    const int thread = arch::thread_index(), warp = arch::warp_index();
    store(operand, params.input);
    if (!has(Slip::no_proxy_fence) && !has(Slip::proxy_fence_too_soon)) arch::fence_async_proxy();
    arch::sync_threads();
    float sum[32] = {};
    if (!has(Slip::no_warpgroup_fence)) arch::warpgroup_fence(sum);
    const int steps = has(Slip::one_warp_less) && warp == 3 ? 3 : 4;
    for (int k = 0; k < steps; k++) {
      const int step = has(Slip::one_warp_differs) && warp == 1 ? 3 - k : k;
      uint64_t at = arch::operand_at(operand + step * 32);
      if (has(Slip::unswizzled_operand)) at &= ~(uint64_t{3} << 62);
      arch::warpgroup_multiply_add<arch::bfloat16, 64>(sum, at, at);
    }
    if (!has(Slip::never_committed)) arch::warpgroup_commit();
    if (has(Slip::read_before_wait)) params.output[thread] = sum[0];
    if (has(Slip::stored_while_read)) arch::store_shared(operand + thread * 4, 0);
    if (!has(Slip::never_awaited)) arch::warpgroup_wait<0>(sum);
    if (!has(Slip::read_before_wait)) params.output[thread] = sum[0];
  }
};

enum class TileSlip { none, never_awaited, not_aligned, past_the_matrix, read_before_wait, arrives_twice, not_made };

// One tile comes, and each thread sends out the first number of a row.
template <TileSlip SLIP> struct OneTile {
  using Params = HopperMicroParams;
  static constexpr int kThreads = 64, kTileBytes = 64 * 128, kSharedBytes = 2 * kTileBytes + 8;

  SHRANK_DEVICE static bool has(TileSlip slip) { return SLIP == slip; }

  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress barrier = arch::dynamic_shared() + 2 * kTileBytes;
    const arch::SharedAddress tile = arch::dynamic_shared() + (has(TileSlip::not_aligned) ? 128 : 0);
    if (thread == 0) {
      if (!has(TileSlip::not_made)) arch::init_barrier(barrier, 1);
      arch::fence_barrier_init();
      arch::arrive_expecting(barrier, has(TileSlip::arrives_twice) ? 2 * kTileBytes : kTileBytes);
      if (has(TileSlip::arrives_twice)) arch::arrive(barrier);
      arch::copy_tile_async(tile, params.map, 0, has(TileSlip::past_the_matrix) ? 32 : 0, barrier);
    }
    arch::sync_threads();
    const bool waits = !has(TileSlip::never_awaited) && !has(TileSlip::read_before_wait);
    if (waits) arch::await_barrier(barrier, 0);
    if (has(TileSlip::never_awaited)) return;
    const arch::Pack<uint32_t, 4> first = arch::load_shared_words(tile + thread * 128 + thread % 8 * 16);
    params.output[thread] = arch::widen(arch::bfloat16{static_cast<uint16_t>(first.item[0])});
    if (has(TileSlip::read_before_wait)) arch::await_barrier(barrier, 0);
  }
};

}  // namespace shrank::tests
