// dz = grad activation'(h up^T + bias), and its sums over rows, with z never in memory. Of a gated layer those of gate and
// value.
#pragma once

#include "../arch/warp.cuh"
#include "expand.cuh"
#include "expand_backward.h"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK, int FORM> struct ExpandBackward {
  using Params = ExpandBackwardParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, FORM, Params>;
  using Sums = typename Block::UpSums;
  static constexpr int kPairs = Block::kPairs, kThreads = Block::kThreads, kSharedBytes = Block::kTile.expand_bytes();

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

    SHRANK_DEVICE void finish(Sums (&sums)[kPairs], int column) const {
      const Params& params = block.params;
      with_activation(params.activation, [&](auto kind) {
        block.meet(static_cast<const T*>(params.grad), column, [&](int m, int n, int i, uint32_t two) {
          const arch::Pack<float, 2> grad = arch::widen_pair<T>(two);
#pragma unroll
          for (int of = 0; of < 2; of++) to_gradients<decltype(kind)::value>(sums, m, n, i + of, grad.item[of]);
        });
      });
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if (params.sums[i]) sum_rows(params.sums[i], sums[i], column);
        block.write(static_cast<T*>(params.dz[i]), sums[i], column);
      }
    }

    // In place of the sums at one place: of y = activation(z) + residual, or of activation(gate) value.
    template <Activation kind>
    SHRANK_DEVICE static void to_gradients(Sums (&sums)[kPairs], int m, int n, int i, float grad) {
      float& z = sums[0].item[m][n][i];
      if constexpr (kPairs == 1) {
        z = activate_backward<T, kind>(grad, z);
      } else {
        float& value = sums[1].item[m][n][i];
        const float opened = activate<T, kind>(z);
        z = activate_backward<T, kind>(grad * value, z);
        value = grad * opened;
      }
    }

    // Rows that there are not have no gradient, and add nothing; of a gated layer they are left out, as zero times an
    // infinite gate is none. Always in the same order.
    SHRANK_DEVICE void sum_rows(float* of_all, const Sums& sums, int column) const {
      const int lane = arch::lane_index(), first = column + lane % 4 * 2;
      const int64_t row = static_cast<int64_t>(arch::block_x()) * Block::kWarpsM + block.warp_row;
      float* const to = of_all + row * block.params.N + first;
      const int64_t left = block.params.M - block.row - block.warp_row * Sums::kRows - lane / 4;
#pragma unroll
      for (int n = 0; n < Sums::kColumns / kChunk; n++) {
        arch::Pack<float, 2> sum{};
#pragma unroll
        for (int m = 0; m < Block::kFragmentsM; m++) {
          const bool upper = kPairs == 1 || m * 16 < left, lower = kPairs == 1 || m * 16 + 8 < left;
          const float (&fragment)[4] = sums.item[m][n];
#pragma unroll
          for (int i = 0; i < 2; i++) sum.item[i] += (upper ? fragment[i] : 0) + (lower ? fragment[i + 2] : 0);
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
