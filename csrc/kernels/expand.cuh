// What the matrix kernels share: a block owns rows of y = activation(h up^T + bias) + residual, or of a gated layer's y,
// and walks the columns. Its rows of h lie in shared memory, whoever put them there; or, of any rank, they come from
// global memory in panels.
#pragma once

#include <type_traits>
#include <utility>

#include "activation.cuh"
#include "pair.h"
#include "tile.cuh"

namespace shrank {

// FORM: the number of a Form. P: the kernel's parameters, with M, N and as many pairs of factors as the form has; and
// what its end needs: residual, y and activation. Where there are GROUPS, N and R count one group's columns, whose up
// (N, R) follow one another; groups and column tiles share the second axis of the grid. Of two pairs, a warp has the same
// columns, so that their sums meet in a lane's registers.
template <typename T, int BLOCK_M, int MAX_RANK, int FORM, typename P, bool GROUPS = false> struct Block {
  using Params = P;
  static constexpr LinearTile kTile{BLOCK_M, MAX_RANK, static_cast<Form>(FORM)};
  static constexpr int kPairs = kTile.pairs();
  static constexpr bool kPivoted = kTile.form == Form::pivoted;
  static constexpr bool kHoldsH = kTile.holds_h();
  static constexpr int kThreads = kTile.threads();
  static constexpr int BLOCK_N = kTile.block_n(), kWarpsN = LinearTile::kWarpsN, kWarps = kThreads / arch::kWarpSize;
  static constexpr int kPanelBytes = BLOCK_M * kPanelRow;  // of BLOCK_M rows: of x, of h
  static constexpr int kHPanels = kTile.h_panels(), kHBytes = kTile.h_bytes();
  static constexpr int kUpOffset = kHoldsH ? 0
                                           : kPairs * kPanelBytes;  // of up in a slot: behind h, where h is streamed
  static constexpr int kUpBytes = BLOCK_N * kPanelRow;  // of a pair's up
  static constexpr int kStagingOffset = kTile.up_stages() * kTile.up_stage_bytes();
  static constexpr int kStagingBytes = kTile.staging_bytes() / kWarps;  // of a warp

  static constexpr int kWarpsM = kTile.warps_m(), kFragmentsM = BLOCK_M / kWarpsM / 16;
  using UpSums = Sums<kFragmentsM, BLOCK_N / kWarpsN / 8>;
  using UpPipeline = Pipeline<kTile.up_stages(), kTile.up_stage_bytes()>;
  using Stage = Staging<T, UpSums::kColumns>;
  static constexpr int kStagedRows = min_of(UpSums::kRows, kStagingBytes / Stage::kRowBytes);  // at a time
  static_assert(UpSums::kRows % kStagedRows == 0 && kStagedRows % 16 == 0);

  const Params& params;
  const int64_t row;  // the block's first
  const int group, share;  // of columns
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

  SHRANK_DEVICE Pair pair(int i) const {
    if constexpr (GROUPS) return {params.down, params.up, params.bias, params.h, params.R};
    else return params.pair[i];
  }

  // Where a pair's panels of h begin, and one of them.
  SHRANK_DEVICE SharedAddress h_of(int i, int panel = 0) const {
    return h_panels + (i * kHPanels + panel) * kPanelBytes;
  }

  // The copies join the group of the first panel of up, and have landed when that has.
  SHRANK_DEVICE void load_h() const {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      PanelLoader<T, BLOCK_M, kThreads> h(h_in_memory(i), row);
#pragma unroll
      for (int panel = 0; panel < kHPanels; panel++) h.load(h_of(i, panel));
    }
  }

  SHRANK_DEVICE Matrix<T> h_in_memory(int i) const { return {static_cast<const T*>(pair(i).h), params.M, pair(i).R}; }
  SHRANK_DEVICE Matrix<T> up(int i) const {
    const Pair of = pair(i);
    if constexpr (kPivoted) return {static_cast<const T*>(of.up), params.N - of.R, of.R};
    else return {static_cast<const T*>(of.up) + static_cast<int64_t>(of_all(0)) * of.R, params.N, of.R};
  }
  SHRANK_DEVICE int rank_panels() const {
    int most = ceil_div(pair(0).R, kPanel);
#pragma unroll
    for (int i = 1; i < kPairs; i++) most = max_of(most, ceil_div(pair(i).R, kPanel));
    return most;
  }

  using UpLoader = std::conditional_t<kPivoted, PlacedLoader<T, BLOCK_N, kThreads>, PanelLoader<T, BLOCK_N, kThreads>>;
  SHRANK_DEVICE UpLoader up_loader(int i, int tile) const {
    if constexpr (kPivoted) return {up(i), pair(i).order + tile * BLOCK_N, params.N - tile * BLOCK_N};
    else return {up(i), tile * int64_t{BLOCK_N}};
  }

  // Fills slots with the panels of up, and of h where it is streamed: through the rank, tile after tile.
  struct Walk {
    struct Source {
      UpLoader up;
      PanelCompanion<T, BLOCK_M, kThreads> h;
    };
    const int rank_panels;
    int rows, left;  // of up that are left from this tile on; panels of the tile
    Source source[kPairs];

    SHRANK_DEVICE Walk(const Block& block, int tile, int rank_panels)
        : Walk(block, tile, rank_panels, std::make_integer_sequence<int, kPairs>{}) {}

    template <int... I>
    SHRANK_DEVICE Walk(const Block& block, int tile, int rank_panels, std::integer_sequence<int, I...>)
        : rank_panels(rank_panels),
          rows(block.params.N - tile * BLOCK_N),
          left(rank_panels),
          source{{block.up_loader(I, tile), {block.h_in_memory(I), block.row}}...} {}

    SHRANK_DEVICE void operator()(SharedAddress slot, bool go) {
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if constexpr (!kHoldsH) source[i].h.load(slot + i * kPanelBytes, source[i].up, go);
        source[i].up.load(slot + kUpOffset + i * kUpBytes, go);
      }
      if (--left) return;
      left = rank_panels;
      rows -= BLOCK_N;
#pragma unroll
      for (Source& each : source) {
        each.up.restart_below(rank_panels, rows);
        if constexpr (!kHoldsH) each.h.restart(rank_panels);
      }
    }
  };

  // h up^T + bias and its end, one tile of columns after the other, one pipeline running through all of them.
  // `prepare_h` runs while the first panels of up are on their way; the first step's barrier shows its work to all.
  // `end` is told of a tile's first column of this warp before its products and after, when it gets the sums.
  // WHOLE_TILE: all panels of h that the tile has are met, filled if only with zeros, in straight code; else those that R
  // needs, in a loop, as of two pairs, whose steps are longer.
  template <bool WHOLE_TILE = kHoldsH && kPairs == 1, typename PrepareH, typename End>
  SHRANK_DEVICE void expand(const PrepareH& prepare_h, const End& end) const {
    const int first = first_tile(), last = min_of(first + tiles_of_share(), tiles());
    const int rank_panels = WHOLE_TILE ? kHPanels : this->rank_panels();
    Walk walk(*this, first, rank_panels);
    UpPipeline panels(slots, (last - first) * rank_panels, walk);
    prepare_h();
    arch::grid_dependency_launch();
    for (int tile = first; tile < last; tile++) {
      const int column = tile * BLOCK_N + warp_column * UpSums::kColumns;
      end.begin(column);
      const std::conditional_t<kPivoted, Places, Bias> bias(*this, column);
      UpSums sums[kPairs];
      const auto multiply = [&](int panel, int steps) {
        const SharedAddress slot = panels.arrive();
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
          multiply_panels<T>(sums[i], kHoldsH ? h_of(i, panel) : slot + i * kPanelBytes, warp_row * UpSums::kRows,
                             slot + kUpOffset + i * kUpBytes, warp_column * UpSums::kColumns, steps, AllRows{}, [&] {
            if (i == 0) panels.refill(slot, walk);
          });
        }
      };
      if constexpr (WHOLE_TILE) {
#pragma unroll
        for (int panel = 0; panel < kHPanels; panel++)
          multiply(panel, min_of((MAX_RANK - panel * kPanel) / 16, kPanel / 16));
      } else {
#pragma unroll 1
        for (int panel = 0; panel < rank_panels; panel++) multiply(panel, kPanel / 16);  // zeros beyond the rank
      }
      bias.add_to(sums);
      end.finish(sums, column);
    }
  }

  // To y.
  template <bool WHOLE_TILE = kHoldsH && kPairs == 1, typename PrepareH> SHRANK_DEVICE void expand(
      const PrepareH& prepare_h) const {
    expand<WHOLE_TILE>(prepare_h, ToOutput{*this});
  }

  // Training needs a pair's h: from the panels, 16 bytes at a time.
  SHRANK_DEVICE void save_h(int i) const {
    const Pair of = pair(i);
    arch::sync_threads();
    const int chunks = of.R / kChunk;
    for (int each = arch::thread_index(); each < BLOCK_M * chunks; each += kThreads) {
      const int at = each / chunks, chunk = each % chunks;
      if (row + at >= params.M) return;
      const SharedAddress panel = h_of(i, chunk / kPanelChunks);
      const int64_t first = ((row + at) * groups() + group) * of.R;
      arch::store(static_cast<uint32_t*>(of.h) + first / 2 + chunk * 4,
                  arch::load_shared_words(chunk_at(panel, at, chunk % kPanelChunks)));
    }
  }

  // A row of a warp's tile is at most one line of 128 bytes; a lane has every 32nd.
  SHRANK_DEVICE void prefetch(const void* matrix, int column) const {
    const int first = warp_row * UpSums::kRows + arch::lane_index();
    const T* const line = static_cast<const T*>(matrix) + at(row + first, column);
    const int64_t left = column < params.N ? params.M - row - first : 0;
#pragma unroll
    for (int below = 0; below < UpSums::kRows; below += arch::kWarpSize)
      arch::prefetch_if(below < left, line + arch::multiply_wide(params.N * groups(), below));
  }

  // Of the lane's columns in the fragments: asked for before the products, used after them.
  struct Bias {
    const Block& block;
    uint32_t two[kPairs][UpSums::kColumns / kChunk];

    SHRANK_DEVICE Bias(const Block& block, int column) : block(block) {
      const int first = block.of_all(column) + arch::lane_index() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        const void* const bias = block.pair(i).bias;
        const int columns = bias ? block.params.N - column : 0;
        const char* const from = static_cast<const char*>(bias) +
                                 arch::multiply_wide(first, static_cast<int>(sizeof(T)));
#pragma unroll
        for (int n = 0; n < UpSums::kColumns / kChunk; n++)
          two[i][n] = arch::load_word_if(n * kChunk < columns, from + n * kChunk * sizeof(T));
      }
    }

    SHRANK_DEVICE void add_to(UpSums (&sums)[kPairs]) const {
#pragma unroll
      for (int i = 0; i < kPairs; i++) {
        if (!block.pair(i).bias) continue;
#pragma unroll
        for (auto& row : sums[i].item) {
#pragma unroll
          for (int n = 0; n < UpSums::kColumns / kChunk; n++) {
            add_pair<T>(row[n][0], row[n][1], two[i][n]);
            add_pair<T>(row[n][2], row[n][3], two[i][n]);
          }
        }
      }
    }
  };

  // Of pivoted factors, whose columns know their places too late to ask for anything before the products: h, where a column
  // is a pivot, in place of a sum; and the bias of either kind.
  struct Places {
    const Block& block;
    const int column;

    SHRANK_DEVICE Places(const Block& block, int column) : block(block), column(column) {}

    SHRANK_DEVICE void add_to(UpSums (&sums)[kPairs]) const {
      const Pair of = block.pair(0);
      const int lane = arch::lane_index();
#pragma unroll
      for (int n = 0; n < UpSums::kColumns / kChunk; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int at = column + n * kChunk + lane % 4 * 2 + i;
          const bool exists = at < block.params.N;
          const int place = static_cast<int>(arch::load_word_if(exists, of.order + at));
          const bool is_pivot = exists && place < of.R;
          if (is_pivot) {  // a branch keeps what comes from h out of the registers of other columns
            const ColumnOfH h(block, place);
            for_constants<kRows>([&](auto m) {
              constexpr int kRow = decltype(m)::value;
              sums[0].item[kRow / 2][n][kRow % 2 * 2 + i] = h.template number<kRow * 8>();
            });
          }
          if (!of.bias && !of.pivot_bias) continue;
          const T* const bias = static_cast<const T*>(is_pivot ? of.pivot_bias : of.bias);
          if (!exists || !bias) continue;
          const float added = arch::widen(arch::load<T, 1>(bias + (is_pivot ? place : place - of.R)).item[0]);
#pragma unroll
          for (int m = 0; m < kRows; m++) sums[0].item[m / 2][n][m % 2 * 2 + i] += added;
        }
      }
    }

    static constexpr int kRows = 2 * kFragmentsM;  // of the lane, 8 apart
  };

  // A column of h in the lane's rows of the fragments: from the panels, or where h is streamed from memory.
  struct ColumnOfH {
    const T* from = nullptr;
    SharedAddress place = 0;
    int stride, left, within;

    SHRANK_DEVICE ColumnOfH(const Block& block, int column) : within(column % 4) {
      const int first = block.warp_row * UpSums::kRows + arch::lane_index() / 4;
      if constexpr (kHoldsH) {
        place = chunk_at(block.h_of(0) + column / kPanel * kPanelBytes, first, column % kPanel / kChunk) +
                column % kChunk / 4 * 8;
      } else {
        const Matrix<T> h = block.h_in_memory(0);
        const int64_t rows = h.rows - block.row - first;
        stride = h.columns, left = rows < BLOCK_M ? static_cast<int>(rows) : BLOCK_M;
        from = h.data + (block.row + first) * h.columns + column;
      }
    }

    // Of the row that is ROW, a multiple of 8, below the first.
    template <int ROW> SHRANK_DEVICE float number() const {
      if constexpr (kHoldsH) return number_of_pair<T>(arch::load_shared_pair<ROW * kPanelRow>(place), within);
      else if (ROW >= left) return 0;
      else return arch::widen(arch::load<T, 1>(from + arch::multiply_wide(stride, ROW)).item[0]);
    }
  };

  // y = activation(z) + residual, or activation(gate) value, one step after the other on all of the warp's sums: none
  // waits for the memory of another, and the activation is chosen once.
  struct ToOutput {
    const Block& block;

    SHRANK_DEVICE void begin(int column) const {
      if constexpr (kPairs == 1) {
        if (block.params.residual) block.prefetch(block.params.residual, column);
      }
    }

    SHRANK_DEVICE void finish(UpSums (&sums)[kPairs], int column) const {
      const Params& params = block.params;
      with_activation(params.activation, [&](auto kind) {
        for_each_sum([&](int m, int n, int i) {
          float& sum = sums[0].item[m][n][i];
          sum = activate<T, decltype(kind)::value>(sum);
        });
      });
      if constexpr (kPairs == 2) {
        for_each_sum([&](int m, int n, int i) { sums[0].item[m][n][i] *= sums[1].item[m][n][i]; });
      } else if (params.residual) {
        block.meet(static_cast<const T*>(params.residual), column, [&](int m, int n, int i, uint32_t two) {
          float (&fragment)[4] = sums[0].item[m][n];
          add_pair<T>(fragment[i], fragment[i + 1], two);
        });
      }
      block.write(static_cast<T*>(params.y), sums[0], column);
    }
  };

  // Calls visit with each of the warp's sums: fragments down and along, number.
  template <typename Visit> SHRANK_DEVICE static void for_each_sum(const Visit& visit) {
#pragma unroll
    for (int m = 0; m < kFragmentsM; m++) {
#pragma unroll
      for (int n = 0; n < UpSums::kColumns / kChunk; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) visit(m, n, i);
      }
    }
  }

  // The lines of `kStagedRows` rows of the warp's tile: visit gets the line's first row there, as a type, the lane's chunk
  // of it in `matrix`, (M, N) as y is, and whether that exists.
  template <typename U, typename Visit>
  SHRANK_DEVICE void for_each_line(U* matrix, int first_row, int column, const Visit& visit) const {
    const int n = column + arch::lane_index() % Stage::kRowChunks * kChunk;
    const int64_t m = row + warp_row * UpSums::kRows + first_row + arch::lane_index() / Stage::kRowChunks;
    const int64_t left = n < params.N ? params.M - m : 0;
    const int rows = left < kStagedRows ? static_cast<int>(left) : kStagedRows;
    U* const start = matrix + at(m, n);
    for_constants<kStagedRows / Stage::kRowsAtOnce>([&](auto line) {
      constexpr int kRow = decltype(line)::value * Stage::kRowsAtOnce;
      visit(std::integral_constant<int, kRow>{}, start + arch::multiply_wide(params.N * groups(), kRow), kRow < rows);
    });
  }

  SHRANK_DEVICE void write(T* to, const UpSums& sums, int column) const {
    const Stage stage{staging};
#pragma unroll
    for (int first = 0; first < UpSums::kRows; first += kStagedRows) {
      arch::sync_warp();  // what was there has been read
      for_constants<kStagedRows / 16>([&](auto sixteen) {
        const auto& row = sums.item[first / 16 + decltype(sixteen)::value];
#pragma unroll
        for (int n = 0; n < UpSums::kColumns / kChunk; n += 2)
          stage.template put<decltype(sixteen)::value * 16>(n, row[n], row[n + 1]);
      });
      arch::sync_warp();
      for_each_line(to, first, column, [&](auto line, T* chunk, bool exists) {
        constexpr int kRow = decltype(line)::value;
        const auto words = arch::load_shared_words<Stage::template kBelow<kRow>>(stage.template line_start<kRow>());
        if (exists) arch::store(reinterpret_cast<uint32_t*>(chunk), words);
      });
    }
  }

  // Calls `combine` with each place of two neighbouring sums, fragments down and along and number, and the two numbers
  // there in `matrix`, (M, N) as y is; zeros, where there are none.
  template <typename Combine>
  SHRANK_DEVICE void meet(const T* matrix, int column, const Combine& combine) const {
    const Stage stage{staging};
#pragma unroll
    for (int first = 0; first < UpSums::kRows; first += kStagedRows) {
      arch::sync_warp();  // what was there has been read
      for_each_line(matrix, first, column, [&](auto line, const T* chunk, bool exists) {
        constexpr int kRow = decltype(line)::value;
        arch::copy_async(stage.template line_start<kRow>() + Stage::template kBelow<kRow>, chunk, exists ? 16 : 0);
      });
      arch::copy_async_commit();
      arch::copy_async_wait<0>();
      arch::sync_warp();
#pragma unroll
      for (int m = 0; m < kStagedRows; m += 16) {
#pragma unroll
        for (int n = 0; n < UpSums::kColumns / kChunk; n += 2) {
          uint32_t pairs[4];
          stage.get(pairs, m, n);
          const int down = (first + m) / 16;
          combine(down, n, 0, pairs[0]);
          combine(down, n, 2, pairs[1]);
          combine(down, n + 1, 0, pairs[2]);
          combine(down, n + 1, 2, pairs[3]);
        }
      }
    }
  }
};

}  // namespace shrank
