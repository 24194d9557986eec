// y = activation(h up^T + bias) + residual with h the convolution of x with the filters in down, on tensor cores: the
// windows of x are the rows of a matrix that is never written. Either stage may have groups.
#pragma once

#include "expand.cuh"
#include "gather.cuh"

namespace shrank {

template <typename T, Gather HOW, int BLOCK_M, int MAX_RANK> struct LowRankConv {
  using Params = LowRankConvParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, number_of(Form::plain), Params, true>;
  static constexpr ConvTile kTile{HOW, {BLOCK_M, MAX_RANK}};
  static constexpr int kThreads = Block::kThreads, kSharedBytes = kTile.shared_bytes(), kOrigins = kTile.origins(),
                       kTaps = kTile.taps();
  using DownSums = Sums<Block::kFragmentsM, MAX_RANK / Block::kWarpsN / 8>;
  using DownPipeline = Pipeline<kTile.tile.down_stages(), kTile.tile.down_stage_bytes()>;

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    const SharedAddress origins = arch::dynamic_shared() + kOrigins;
    DownSums h;
    if constexpr (HOW == Gather::chunks) {
      const ListedTaps<BLOCK_M, kThreads> taps{origins, arch::dynamic_shared() + kTaps};
      taps.write(params.window, block.row, params.M);
      arch::sync_threads();
      arch::grid_dependency_wait();
      contract(block, taps, h);
    } else {
      find_origins<BLOCK_M, kThreads>(origins, params.window, block.row, params.M);
      arch::sync_threads();
      arch::grid_dependency_wait();
      contract(block, origins, h);
    }
    arch::sync_threads();  // all are done with the panels of x and down: those of up take their place
    block.expand([&] {
      round_into_panels<T>(block.h_panels, Block::kPanelBytes, h, block.warp_row * DownSums::kRows,
                           block.warp_column * DownSums::kColumns, params.R);
      if (params.h && block.share == 0) block.save_h(0);
    });
  }

  // This warp's part of h, of one group of the first stage.
  SHRANK_DEVICE static void contract(const Block& block, const ListedTaps<BLOCK_M, kThreads>& taps, DownSums& h) {
    const Params& params = block.params;
    const int runs = params.group_channels / params.run_channels;
    const int steps = ceil_div(params.window.taps() * params.run_channels, kPanel) * runs;
    ListedWalk<T, BLOCK_M, MAX_RANK, kThreads> walk(params, taps, block.group);
    const auto load = [&](SharedAddress slot, bool go) { walk.load(slot, slot + Block::kPanelBytes, go); };
    DownPipeline panels(block.slots, steps, load);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const SharedAddress slot = panels.arrive();
      multiply_panels<T>(h, slot, block.warp_row * DownSums::kRows, slot + Block::kPanelBytes,
                         block.warp_column * DownSums::kColumns, kPanel / 16, AllRows{},
                         [&] { panels.refill(slot, load); });
    }
  }

  // This warp's part of h: one group of the first stage after the other; of each, one run of channels after the other
  // with all taps, so that most of what a tap reads of x is still in L1 from the taps before.
  SHRANK_DEVICE static void contract(const Block& block, SharedAddress origins, DownSums& h) {
    const Params& params = block.params;
    const int runs = params.group_channels / params.run_channels, columns = params.R / params.segments;
    const int steps = ceil_div(params.window.taps() * params.run_channels, kPanel);
    const T* const down = static_cast<const T*>(params.down) + static_cast<int64_t>(block.group) * params.R * params.K;
    Windows<T, HOW, BLOCK_M, kThreads> windows{params, origins};
    int next = 0, run = 0, segment = 0;
    const auto load = [&](SharedAddress slot, bool go) {
      if (!go) return;
      const int begin = segment * columns, channel = run * params.run_channels;
      const int group = (block.group * params.R + begin) / params.down_rank;
      if (next == 0) windows.restart();
      windows.load(slot, group * params.group_channels + channel);
      windows.load_down(slot + Block::kPanelBytes, {down, begin + columns, params.K}, begin, channel);
      windows.advance();
      if (++next == steps) next = 0, run++;
      if (run == runs) run = 0, segment++;
    };
    DownPipeline panels(block.slots, steps * runs * params.segments, load);
    for (int begin = 0; begin < params.R; begin += columns) {
#pragma unroll 1
      for (int i = 0; i < steps * runs; i++) {
        const SharedAddress slot = panels.arrive();
        multiply_panels<T>(h, slot, block.warp_row * DownSums::kRows, slot + Block::kPanelBytes,
                           block.warp_column * DownSums::kColumns, kPanel / 16, SomeRows{begin, begin + columns},
                           [&] { panels.refill(slot, load); });
      }
    }
  }
};

}  // namespace shrank
