// Barriers, copies of tiles and products of four warps: arch/hopper.cuh, arch/warpgroup.cuh. Elsewhere the kernels are
// empty, and not launched.
#pragma once

#include "../arch/sync.cuh"
#include "../arch/warpgroup.cuh"
#include "case.cuh"

namespace shrank::conformance {

// The input as a matrix of which two tiles are copied: one inside, one that ends beyond the last row and column.
struct TileParams : Params { arch::TensorMap map; };
inline constexpr int kMatrixRows = 24, kMatrixColumns = 72, kTileRows = 16, kTileColumns = 64;

struct CopyTileAsync : Case<Inputs::bits, kWarp, kMatrixRows * kMatrixColumns / 2, kTileRows * kTileColumns, 4096 + 8> {
  using Params = TileParams;
  static constexpr bool kHopper = true;

  SHRANK_DEVICE static void run([[maybe_unused]] const Params& params) {
#ifdef SHRANK_HOPPER
    constexpr int kBytes = kTileRows * kTileColumns * 2;
    const arch::SharedAddress shared = arch::dynamic_shared(), barrier = shared + 2 * kBytes;
    if (arch::lane_index() == 0) {
      arch::init_barrier(barrier, 1);
      arch::fence_barrier_init();
      arch::arrive_expecting(barrier, 2 * kBytes);
      arch::copy_tile_async(shared, params.map, 0, 0, barrier);
      arch::copy_tile_async(shared + kBytes, params.map, kTileColumns, kTileRows, barrier);
    }
    arch::sync_warp();
    arch::await_barrier(barrier, 0);
    for (int i = arch::lane_index(); i < kOutputWords / 4; i += kWarp)
      arch::store(words_out(params) + i * 4, arch::load_shared_words(shared + i * 16));
#endif
  }
};

// Two phases of a barrier: in each, all threads arrive, and then read what their opposite had stored.
struct Arrive : Case<Inputs::bits, 64, 64, 2 * 64 * 4, 64 * 16 + 8> {
  static constexpr bool kHopper = true;

  SHRANK_DEVICE static void run([[maybe_unused]] const Params& params) {
#ifdef SHRANK_HOPPER
    const int thread = arch::thread_index();
    const arch::SharedAddress shared = arch::dynamic_shared(), barrier = shared + kThreads * 16;
    if (thread == 0) {
      arch::init_barrier(barrier, kThreads);
      arch::fence_barrier_init();
    }
    arch::sync_threads();
    arch::await_barrier(barrier, 1);  // returns at once
    for (uint32_t phase = 0; phase < 2; phase++) {
      for (uint32_t i = 0; i < 4; i++)
        arch::store_shared(shared + thread * 16 + i * 4, words_in(params)[thread] + phase * 4 + i);
      arch::arrive(barrier);
      arch::await_barrier(barrier, phase);
      arch::store(words_out(params) + (phase * kThreads + thread) * 4,
                  arch::load_shared_words(shared + (kThreads - 1 - thread) * 16));
      arch::sync_threads();
    }
#endif
  }
};

// sum (64, N) = a (64, 64) b (N, 64)^T; the input is a and then b. The output is what each thread holds, in its order.
template <typename T, int N>
struct WarpgroupMultiplyAdd : Case<kFactors<T>, 128, (64 + N) * 32, 64 * N, (64 + N) * 128> {
  using Base = Case<kFactors<T>, 128, (64 + N) * 32, 64 * N, (64 + N) * 128>;
  static constexpr bool kHopper = true;

  SHRANK_DEVICE static void run([[maybe_unused]] const Params& params) {
#ifdef SHRANK_HOPPER
    const arch::SharedAddress a = arch::dynamic_shared(), b = a + 64 * 128;
    for (int i = arch::thread_index(); i < Base::kInputWords; i += Base::kThreads) {
      const int row = i / 32, chunk = i % 32 / 4;
      arch::store_shared(a + row * 128 + (chunk ^ row % 8) * 16 + i % 4 * 4, words_in(params)[i]);
    }
    arch::fence_async_proxy();
    arch::sync_threads();
    float sum[N / 2] = {};
    arch::warpgroup_fence(sum);
#pragma unroll
    for (int k = 0; k < 4; k++)
      arch::warpgroup_multiply_add<T, N>(sum, arch::operand_at(a + k * 32), arch::operand_at(b + k * 32));
    arch::warpgroup_commit();
    arch::warpgroup_wait<0>(sum);
#pragma unroll
    for (int i = 0; i < N / 2; i++) output<float>(params)[arch::thread_index() * (N / 2) + i] = sum[i];
#endif
  }
};

}  // namespace shrank::conformance
