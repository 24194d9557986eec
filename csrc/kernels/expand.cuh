// What the matrix kernels share: a block owns rows of y = activation(h up^T + bias) + residual and walks the columns.
// Its rows of h lie in shared memory, whoever put them there; or, of any rank, they come from global memory in panels.
#pragma once

#include "activation.cuh"
#include "tile.cuh"

namespace shrank {

// P: the kernel's parameters, with M, N, R, up, bias, residual, h, z and y. Where there are GROUPS, N and R count one
// group's columns, whose up (N, R) follow one another; groups and column tiles share the second axis of the grid.
template <typename T, int BLOCK_M, int MAX_RANK, typename P, bool GROUPS> struct Block {
  using Params = P;
  using Chunk = arch::Pack<T, kChunk>;
  static constexpr LinearTile kTile{BLOCK_M, MAX_RANK};
  static constexpr bool kHoldsH = kTile.holds_h();
  static constexpr int kThreads = kTile.threads();
  static constexpr int BLOCK_N = LinearTile::kBlockN, kWarpsN = kTile.warps_n(), kWarps = kThreads / arch::kWarpSize;
  static constexpr int kPanelBytes = BLOCK_M * kPanelRow;  // of BLOCK_M rows: of x, of h
  static constexpr int kHPanels = kTile.h_panels(), kHBytes = kTile.h_bytes();
  static constexpr int kUpOffset = kHoldsH ? 0 : kPanelBytes;  // of up in a slot: behind h, where h is streamed
  static constexpr int kStagingOffset = kTile.up_stages() * kTile.up_stage_bytes();
  static constexpr int kStagingBytes = kTile.staging_bytes() / kWarps;  // of a warp

  static constexpr int kFragmentsM = BLOCK_M / LinearTile::kWarpsM / 16;
  using UpSums = Sums<kFragmentsM, BLOCK_N / kWarpsN / 8>;
  // All rows of up. A convolution's largest tiles have no registers for the loads that the compiler brings forward where
  // it knows that (nvcc 13.0: they spill): as conditions that always hold, they are not moved.
  using Rows = std::conditional_t<GROUPS, SomeRows, AllRows>;
  using UpPipeline = Pipeline<kTile.up_stages(), kTile.up_stage_bytes()>;
  static_assert(kStagingBytes == 16 * UpSums::kColumns * 4);

  const Params& params;
  const int64_t row;                // the block's first
  const int group, share;           // of columns
  const int warp_row, warp_column;  // the warp's place among the warps
  const SharedAddress h_panels, slots, staging;

  SHRANK_DEVICE static Block here(const Params& params) {
    const int warp = arch::warp_index(), y = arch::block_y();
    int group = 0, share = y;
    if constexpr (GROUPS) group = y / params.blocks_n, share = y % params.blocks_n;
    const SharedAddress shared = arch::dynamic_shared(), slots = shared + kHBytes;
    return {
        params, static_cast<int64_t>(arch::block_x()) * BLOCK_M, group, share, warp / kWarpsN, warp % kWarpsN, shared,
        slots,  slots + kStagingOffset + warp * kStagingBytes};
  }

  // Column tiles of a group, which its blocks share; those of a block are neighbours.
  SHRANK_DEVICE int tiles() const { return ceil_div(params.N, BLOCK_N); }
  SHRANK_DEVICE int tiles_of_share() const {
    if constexpr (GROUPS) return ceil_div(tiles(), params.blocks_n);
    else return ceil_div(tiles(), arch::blocks_y());
  }
  SHRANK_DEVICE int first_tile() const { return share * tiles_of_share(); }
  SHRANK_DEVICE bool is_idle() const { return first_tile() >= tiles(); }  // the shares of others leave it none

  SHRANK_DEVICE int groups() const {
    if constexpr (GROUPS) return params.up_groups;
    else return 1;
  }
  // Where column n of the group's part of y is in y, and how far apart y's rows are.
  SHRANK_DEVICE int of_all(int n) const { return group * params.N + n; }
  SHRANK_DEVICE int64_t at(int64_t m, int n) const { return m * (params.N * groups()) + of_all(n); }

  // The copies join the group of the first panel of up, and have landed when that has.
  SHRANK_DEVICE void load_h() const {
    const Matrix<T> h{static_cast<const T*>(params.h), params.M, params.R};
#pragma unroll
    for (int panel = 0; panel < kHPanels; panel++)
      load_panel<BLOCK_M, kThreads>(h_panels + panel * kPanelBytes, h, row, panel * kPanel);
  }

  // y = h up^T and its end, one tile of columns after the other, one pipeline running through all of them.
  // `prepare_h` runs while the first panels of up are on their way; the first step's barrier shows its work to all.
  // WHOLE_TILE: all panels of h that the tile has are filled, if only with zeros; else those that R needs.
  template <bool WHOLE_TILE = kHoldsH, typename PrepareH> SHRANK_DEVICE void expand(const PrepareH& prepare_h) const {
    const Matrix<T> h{static_cast<const T*>(params.h), params.M, params.R};
    const Matrix<T> up{static_cast<const T*>(params.up) + static_cast<int64_t>(of_all(0)) * params.R, params.N,
                       params.R};
    const int first = first_tile(), last = min_of(first + tiles_of_share(), tiles());
    const int rank_panels = WHOLE_TILE ? kHPanels : ceil_div(params.R, kPanel);
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
#pragma unroll 4
      for (int panel = 0; panel < rank_panels; panel++) {
        const SharedAddress slot = panels.advance(step++, load);
        multiply_panels<T>(sums, kHoldsH ? h_panels + panel * kPanelBytes : slot, warp_row * UpSums::kRows,
                           slot + kUpOffset, warp_column * UpSums::kColumns, steps_of(panel), Rows{});
      }
      finish(sums, column);
    }
  }

  // Steps of 16 columns in a panel of h: fewer in the last one, where the rank is no multiple of a panel's width.
  SHRANK_DEVICE int steps_of(int panel) const {
    if constexpr (kHoldsH && MAX_RANK % kPanel == 0) return kPanel / 16;
    else return min_of(ceil_div((kHoldsH ? MAX_RANK : params.R) - panel * kPanel, 16), kPanel / 16);
  }

  // Training needs h: from the panels, 16 bytes at a time.
  SHRANK_DEVICE void save_h() const {
    arch::sync_threads();
    const int chunks = params.R / kChunk;
    for (int i = arch::thread_index(); i < BLOCK_M * chunks; i += kThreads) {
      const int at = i / chunks, chunk = i % chunks;
      if (row + at >= params.M) return;
      const SharedAddress panel = h_panels + chunk / kPanelChunks * kPanelBytes;
      const int64_t first = ((row + at) * groups() + group) * params.R;
      arch::store(static_cast<uint32_t*>(params.h) + first / 2 + chunk * 4,
                  arch::load_shared_words(chunk_at(panel, at, chunk % kPanelChunks)));
    }
  }

  // A row of a warp's tile is at most one line of 128 bytes.
  SHRANK_DEVICE void prefetch_residual(int column) const {
    for (int at = arch::lane_index(); at < UpSums::kRows; at += arch::kWarpSize) {
      const int64_t m = row + warp_row * UpSums::kRows + at;
      const T* line = static_cast<const T*>(params.residual) + this->at(m, column);
      if (m < params.M && column < params.N) arch::prefetch(line);
    }
  }

  SHRANK_DEVICE void finish(const UpSums& sums, int first_column) const {
    const int n = first_column + chunk_column<UpSums::kColumns / 8>();
    Chunk bias{};  // as it is in memory: widened, it would take twice the registers
    if (params.bias && n < params.N) bias = arch::load<T, kChunk>(static_cast<const T*>(params.bias) + of_all(n));
    with_activation(params.activation, [&](auto kind) {
      for_each_chunk(staging, sums, [&](int tile_row, float (&z)[kChunk]) {
        const int64_t m = row + warp_row * UpSums::kRows + tile_row;
        if (m >= params.M || n >= params.N) return;
        const int64_t offset = at(m, n);
        if (params.bias) add(z, bias);
        if (params.z) round_to(static_cast<T*>(params.z) + offset, z);
#pragma unroll
        for (int i = 0; i < kChunk; i++) z[i] = activate<T, decltype(kind)::value>(z[i]);
        if (params.residual) add(z, arch::load<T, kChunk>(static_cast<const T*>(params.residual) + offset));
        round_to(static_cast<T*>(params.y) + offset, z);
      });
    });
  }

  SHRANK_DEVICE static void add(float (&values)[kChunk], const Chunk& chunk) {
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
