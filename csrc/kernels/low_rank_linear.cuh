// y = activation(h up^T + bias) + residual with h = x down^T: h computed from x, or given.
#pragma once

#include "expand.cuh"
#include "low_rank_linear.h"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK> struct LowRankLinear {
  using Params = LowRankLinearParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, Params, false>;
  static constexpr LinearTile kTile = Block::kTile;
  static constexpr int kThreads = Block::kThreads, kSharedBytes = kTile.shared_bytes();
  using DownSums = Sums<Block::kFragmentsM, Block::kHoldsH ? MAX_RANK / Block::kWarpsN / 8 : 2>;
  using DownPipeline = Pipeline<kTile.down_stages(), kTile.down_stage_bytes()>;

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    arch::grid_dependency_wait();
    if constexpr (!Block::kHoldsH) return block.expand([] {});
    DownSums h;
    if (params.x) {
      contract(block, h);
      arch::sync_threads();  // all are done with the panels of x and down: those of up take their place
    } else {
      block.load_h();
    }
    block.expand([&] {
      if (!params.x) return;
      round_into_panels<T>(block.h_panels, Block::kPanelBytes, h, block.warp_row * DownSums::kRows,
                           block.warp_column * DownSums::kColumns, params.R);
      if (params.h && block.share == 0) block.save_h();
    });
  }

  // h = x down^T, this warp's part of it.
  SHRANK_DEVICE static void contract(const Block& block, DownSums& h) {
    const Params& params = block.params;
    PanelLoader<T, BLOCK_M, kThreads> x({static_cast<const T*>(params.x), params.M, params.K}, block.row);
    PanelLoader<T, MAX_RANK, kThreads> down({static_cast<const T*>(params.down), params.R, params.K}, 0);
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
  }
};

}  // namespace shrank
