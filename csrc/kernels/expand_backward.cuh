// dz = grad activation'(h up^T + bias), and its sums over rows, with z never in memory.
#pragma once

#include "../arch/warp.cuh"
#include "expand.cuh"
#include "expand_backward.h"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK> struct ExpandBackward {
  using Params = ExpandBackwardParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, Params, false>;
  using Sums = typename Block::UpSums;
  static constexpr int kThreads = Block::kThreads, kSharedBytes = Block::kTile.expand_bytes();

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    arch::grid_dependency_wait();
    if constexpr (Block::kHoldsH) block.load_h();
    block.expand([] {}, ToGradient{block});
  }

  struct ToGradient {
    const Block& block;

    SHRANK_DEVICE void begin(int column) const { block.prefetch(block.params.grad, column); }

    SHRANK_DEVICE void finish(Sums& sums, int column) const {
      const Params& params = block.params;
      with_activation(params.activation, [&](auto kind) {
        block.meet(sums, static_cast<const T*>(params.grad), column, [](float& low, float& high, uint32_t pair) {
          const arch::Pack<float, 2> grad = arch::widen_pair<T>(pair);
          low = activate_backward<T, decltype(kind)::value>(grad.item[0], low);
          high = activate_backward<T, decltype(kind)::value>(grad.item[1], high);
        });
      });
      if (params.sums) sum_rows(sums, column);
      block.write(static_cast<T*>(params.dz), sums, column);
    }

    // Rows that there are not have no gradient, and add nothing. Always in the same order.
    SHRANK_DEVICE void sum_rows(const Sums& sums, int column) const {
      const int lane = arch::lane_index(), first = column + lane % 4 * 2;
      const int64_t row = static_cast<int64_t>(arch::block_x()) * LinearTile::kWarpsM + block.warp_row;
      float* const to = block.params.sums + row * block.params.N + first;
#pragma unroll
      for (int n = 0; n < Sums::kColumns / kChunk; n++) {
        arch::Pack<float, 2> sum{};
#pragma unroll
        for (const auto& fragments : sums.item) {
          sum.item[0] += fragments[n][0] + fragments[n][2];
          sum.item[1] += fragments[n][1] + fragments[n][3];
        }
#pragma unroll
        for (float& item : sum.item) item = over_groups(item);
        if (lane < 4 && first + n * kChunk < block.params.N) arch::store(to + n * kChunk, sum);
      }
    }

    // The 8 lanes that hold other rows of the same columns.
    SHRANK_DEVICE static float over_groups(float sum) {
      sum += arch::exchange<4>(sum);
      sum += arch::exchange<8>(sum);
      return sum + arch::exchange<16>(sum);
    }
  };
};

}  // namespace shrank
