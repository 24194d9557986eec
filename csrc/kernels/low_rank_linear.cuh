// y = activation(h up^T + bias) + residual with h = x down^T. A block owns rows of y and walks the columns. Its rows of
// h stay in shared memory, computed from x or read once; or, of any rank, they come from global memory panel by panel.
#pragma once

#include "activation.cuh"
#include "low_rank_linear.h"
#include "tile.cuh"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK> struct LowRankLinear {
  using Params = LowRankLinearParams;
  using Chunk = arch::Pack<T, kChunk>;
  static constexpr LinearTile kTile{BLOCK_M, MAX_RANK};
  static constexpr bool kHoldsH = kTile.holds_h();
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes();
  static constexpr int BLOCK_N = LinearTile::kBlockN, kWarpsN = kTile.warps_n(), kWarps = kThreads / arch::kWarpSize;
  static constexpr int kPanelBytes = BLOCK_M * kPanelRow;  // of BLOCK_M rows: of x, of h
  static constexpr int kHPanels = kTile.h_panels(), kHBytes = kTile.h_bytes();
  static constexpr int kUpOffset = kHoldsH ? 0 : kPanelBytes;  // of up in a slot: behind h, where h is streamed
  static constexpr int kStagingOffset = kTile.up_stages() * kTile.up_stage_bytes();
  static constexpr int kStagingBytes = kTile.staging_bytes() / kWarps;  // of a warp

  static constexpr int kFragmentsM = BLOCK_M / LinearTile::kWarpsM / 16;
  using DownSums = Sums<kFragmentsM, kHoldsH ? MAX_RANK / kWarpsN / 8 : 2>;
  using UpSums = Sums<kFragmentsM, BLOCK_N / kWarpsN / 8>;
  using DownPipeline = Pipeline<kTile.down_stages(), kTile.down_stage_bytes()>;
  using UpPipeline = Pipeline<kTile.up_stages(), kTile.up_stage_bytes()>;
  static_assert(kStagingBytes == 16 * UpSums::kColumns * 4);

  const Params& params;
  const int64_t row;                // the block's first
  const int warp_row, warp_column;  // the warp's place among the warps
  const SharedAddress h_panels, slots, staging;

  SHRANK_DEVICE static void run(const Params& params) {
    const int warp = arch::warp_index();
    const SharedAddress shared = arch::dynamic_shared(), slots = shared + kHBytes;
    const LowRankLinear block{params, static_cast<int64_t>(arch::block_x()) * BLOCK_M, warp / kWarpsN, warp % kWarpsN,
                              shared, slots, slots + kStagingOffset + warp * kStagingBytes};
    if (block.first_tile() >= block.tiles()) return;  // the shares of others leave it none
    arch::grid_dependency_wait();
    if constexpr (!kHoldsH) return block.expand([] {});
    DownSums h;
    if (params.x) {
      block.contract(h);
      arch::sync_threads();  // all are done with the panels of x and down: those of up take their place
    } else {
      block.load_h();
    }
    block.expand([&] {
      if (!params.x) return;
      round_into_panels<T>(block.h_panels, kPanelBytes, h, block.warp_row * DownSums::kRows,
                           block.warp_column * DownSums::kColumns);
      if (params.h && arch::block_y() == 0) block.save_h();
    });
  }

  // Of columns; those of a block are neighbours.
  SHRANK_DEVICE int tiles() const { return ceil_div(params.N, BLOCK_N); }
  SHRANK_DEVICE int share() const { return ceil_div(tiles(), arch::blocks_y()); }
  SHRANK_DEVICE int first_tile() const { return arch::block_y() * share(); }

  // h = x down^T, this warp's part of it.
  SHRANK_DEVICE void contract(DownSums& h) const {
    const Matrix<T> x{static_cast<const T*>(params.x), params.M, params.K};
    const Matrix<T> down{static_cast<const T*>(params.down), params.R, params.K};
    const DownPipeline panels{slots, ceil_div(params.K, kPanel)};
    const auto load = [&](int step, SharedAddress slot) {
      load_panel<BLOCK_M, kThreads>(slot, x, row, step * kPanel);
      load_panel<MAX_RANK, kThreads>(slot + kPanelBytes, down, 0, step * kPanel);
    };
    panels.start(load);
    for (int step = 0; step < panels.steps; step++) {
      const SharedAddress slot = panels.advance(step, load);
      multiply_panels<T>(h, slot, warp_row * DownSums::kRows, slot + kPanelBytes, warp_column * DownSums::kColumns);
    }
  }

  // The copies join the group of the first panel of up, and have landed when that has.
  SHRANK_DEVICE void load_h() const {
    const Matrix<T> h{static_cast<const T*>(params.h), params.M, params.R};
#pragma unroll
    for (int panel = 0; panel < kHPanels; panel++)
      load_panel<BLOCK_M, kThreads>(h_panels + panel * kPanelBytes, h, row, panel * kPanel);
  }

  // y = h up^T and its end, one tile of columns after the other, one pipeline running through all of them.
  // `prepare_h` runs while the first panels of up are on their way; the first step's barrier shows its work to all.
  template <typename PrepareH> SHRANK_DEVICE void expand(const PrepareH& prepare_h) const {
    const Matrix<T> h{static_cast<const T*>(params.h), params.M, params.R};
    const Matrix<T> up{static_cast<const T*>(params.up), params.N, params.R};
    const int first = first_tile(), last = min_of(first + share(), tiles());
    const int rank_panels = kHoldsH ? kHPanels : ceil_div(params.R, kPanel);
    const UpPipeline panels{slots, (last - first) * rank_panels};
    const auto load = [&](int step, SharedAddress slot) {
      const int column = (first + step / rank_panels) * BLOCK_N, rank = step % rank_panels * kPanel;
      if constexpr (!kHoldsH) load_panel<BLOCK_M, kThreads>(slot, h, row, rank);
      load_panel<BLOCK_N, kThreads>(slot + kUpOffset, up, column, rank);
    };
    panels.start(load);
    prepare_h();
    arch::grid_dependency_launch();
    int step = 0;
    for (int tile = first; tile < last; tile++) {
      const int column = tile * BLOCK_N + warp_column * UpSums::kColumns;
      if (params.residual) prefetch_residual(column);
      UpSums sums;
#pragma unroll
      for (int panel = 0; panel < rank_panels; panel++) {
        const SharedAddress slot = panels.advance(step++, load);
        multiply_panels<T>(sums, kHoldsH ? h_panels + panel * kPanelBytes : slot, warp_row * UpSums::kRows,
                           slot + kUpOffset, warp_column * UpSums::kColumns,
                           min_of(ceil_div((kHoldsH ? MAX_RANK : params.R) - panel * kPanel, 16), kPanel / 16));
      }
      finish(sums, column);
    }
  }

  // Training needs h: from the panels, 16 bytes at a time.
  SHRANK_DEVICE void save_h() const {
    arch::sync_threads();
    const int chunks = params.R / kChunk;
    for (int i = arch::thread_index(); i < BLOCK_M * chunks; i += kThreads) {
      const int at = i / chunks, chunk = i % chunks;
      if (row + at >= params.M) return;
      const SharedAddress panel = h_panels + chunk / kPanelChunks * kPanelBytes;
      arch::store(static_cast<uint32_t*>(params.h) + (row + at) * params.R / 2 + chunk * 4,
                  arch::load_shared_words(chunk_at(panel, at, chunk % kPanelChunks)));
    }
  }

  // A row of a warp's tile is at most one line of 128 bytes.
  SHRANK_DEVICE void prefetch_residual(int column) const {
    for (int at = arch::lane_index(); at < UpSums::kRows; at += arch::kWarpSize) {
      const int64_t m = row + warp_row * UpSums::kRows + at;
      const T* line = static_cast<const T*>(params.residual) + m * params.N + column;
      if (m < params.M && column < params.N) arch::prefetch(line);
    }
  }

  SHRANK_DEVICE void finish(const UpSums& sums, int first_column) const {
    for_each_chunk(staging, sums, [&](int tile_row, int tile_column, float (&z)[kChunk]) {
      const int64_t m = row + warp_row * UpSums::kRows + tile_row;
      const int n = first_column + tile_column;
      if (m >= params.M || n >= params.N) return;
      const int64_t offset = m * params.N + n;
      if (params.bias) add(z, static_cast<const T*>(params.bias) + n);
      if (params.z) round_to(static_cast<T*>(params.z) + offset, z);
      with_activation(params.activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < kChunk; i++) z[i] = activate<T, decltype(kind)::value>(z[i]);
      });
      if (params.residual) add(z, static_cast<const T*>(params.residual) + offset);
      round_to(static_cast<T*>(params.y) + offset, z);
    });
  }

  SHRANK_DEVICE static void add(float (&values)[kChunk], const T* from) {
    const Chunk chunk = arch::load<T, kChunk>(from);
#pragma unroll
    for (int i = 0; i < kChunk; i++) values[i] += arch::widen(chunk.item[i]);
  }

  SHRANK_DEVICE static void round_to(T* to, const float (&values)[kChunk]) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < kChunk; i++) chunk.item[i] = arch::round_to<T>(values[i]);
    arch::store(to, chunk);
  }
};

}  // namespace shrank
