// y = activation(h up^T + bias) + residual with h = x down^T: h computed from x, or given. Or of two such pairs of factors
// activation(gate) value. Or of pivoted factors.
#pragma once

#include "expand.cuh"
#include "low_rank_linear.h"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK, int FORM> struct LowRankLinear {
  using Params = LowRankLinearParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, FORM, Params>;
  static constexpr LinearTile kTile = Block::kTile;
  static constexpr int kPairs = Block::kPairs, kThreads = Block::kThreads, kSharedBytes = kTile.shared_bytes();
  using DownSums = Sums<Block::kFragmentsM, Block::kHoldsH ? MAX_RANK / Block::kWarpsN / 8 : 2>;
  using DownPipeline = Pipeline<kTile.down_stages(), kTile.down_stage_bytes()>;

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    arch::grid_dependency_wait();
    if constexpr (!Block::kHoldsH) return block.expand([] {});
    const auto save = [&] {
#pragma unroll
      for (int i = 0; i < kPairs; i++)
        if (params.x && block.pair(i).h && block.share == 0) block.save_h(i);
    };
    if constexpr (kPairs == 1) {
      DownSums h;
      if (params.x) contract(block, 0, h);
      else block.load_h();
      block.expand([&] {
        if (params.x) round(block, 0, h);
        save();
      });
    } else {  // beside the loaders of two pairs there are no registers for sums of h
      if (!params.x) block.load_h();
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if (!params.x) break;
        DownSums h;
        contract(block, i, h);
        round(block, i, h);
      }
      block.expand(save);
    }
  }

  SHRANK_DEVICE static void round(const Block& block, int i, const DownSums& h) {
    const int warp_row = kPairs > 1 ? arch::anew(block.warp_row) : block.warp_row;  // 8 addresses, for each pair
    round_into_panels<T>(block.h_of(i), Block::kPanelBytes, h, warp_row * DownSums::kRows,
                         block.warp_column * DownSums::kColumns, block.pair(i).R);
  }

  // h = x down^T of a pair, this warp's part of it. All are done with the panels of x and down then: others may take their
  // place.
  SHRANK_DEVICE static void contract(const Block& block, int i, DownSums& h) {
    const Params& params = block.params;
    const Pair of = block.pair(i);
    PanelLoader<T, BLOCK_M, kThreads> x({static_cast<const T*>(params.x), params.M, params.K}, block.row);
    PanelLoader<T, MAX_RANK, kThreads> down({static_cast<const T*>(of.down), of.R, params.K}, 0);
    const auto load = [&](SharedAddress slot, bool go) {
      x.load(slot, go);
      down.load(slot + Block::kPanelBytes, go);
    };
    const int steps = ceil_div(params.K, kPanel);
    DownPipeline panels(block.slots, steps, load);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const SharedAddress slot = panels.arrive();
      multiply_panels<T>(h, slot, block.warp_row * DownSums::kRows, slot + Block::kPanelBytes,
                         block.warp_column * DownSums::kColumns, kPanel / 16, AllRows{},
                         [&] { panels.refill(slot, load); });
    }
    arch::sync_threads();
  }
};

}  // namespace shrank
