// The shapes in which the matrix kernels are compiled: what select may choose, what kernels/low_rank_linear.cuh takes.
#pragma once

#include <array>
#include <cstdint>

namespace shrank {

// What a column of y comes from: a pair of factors; the two of a gated layer, each with a rank of its own; a pair of
// pivoted factors, where R columns are h itself; or the two of a gated layer, either of which may be pivoted.
enum class Form { plain = 1, gated = 2, pivoted = 3, gated_pivoted = 4 };  // numbers, which are in the kernels' names
constexpr int number_of(Form form) { return static_cast<int>(form); }
constexpr bool is_gated(Form form) { return form == Form::gated || form == Form::gated_pivoted; }
constexpr bool has_pivots(Form form) { return form == Form::pivoted || form == Form::gated_pivoted; }
constexpr int pairs_of(Form form) { return is_gated(form) ? 2 : 1; }

// A block computes block_m rows of y. With a max_rank it holds their h in shared memory, computed from x or read once;
// without, it reads h from global memory panel by panel, again for each column tile, whatever the rank.
struct LinearTile {
  int block_m;  // 32, 64 or 128
  int max_rank;  // of an h that is held: a multiple of 32, at most 256; or 0
  Form form = Form::plain;

  static constexpr int kBlockN = 128;  // columns of h up^T at a time, of all pairs together
  static constexpr int kPanel = 64;  // numbers of a panel row: 128 bytes of 16-bit numbers
  static constexpr int kPanelRow = 128;
  static constexpr int kWarpsN = 2;

  constexpr int pairs() const { return pairs_of(form); }
  constexpr bool holds_h() const { return max_rank > 0; }
  constexpr int block_n() const { return kBlockN / pairs(); }  // columns of y at a time

  // A thread's sums of either stage must fit its registers: at most 128 of them. A block that has an SM for itself, for its
  // shared memory, has 8 warps.
  constexpr int warps_m() const {
    return (block_m == 128 && max_rank * pairs() > 128) || (pairs() > 1 && max_rank > 128) ? 4 : 2;
  }
  constexpr int threads() const { return 32 * warps_m() * kWarpsN; }

  constexpr int h_panels() const { return (max_rank + kPanel - 1) / kPanel; }  // of a pair
  constexpr int h_bytes() const { return pairs() * h_panels() * block_m * kPanelRow; }
  constexpr int down_stage_bytes() const { return (block_m + max_rank) * kPanelRow; }
  constexpr int up_stage_bytes() const { return ((holds_h() ? 0 : pairs() * block_m) + kBlockN) * kPanelRow; }
  // Sums on their way to global memory, rounded: of 16 rows of each warp, or of 32.
  constexpr int staging_bytes() const { return 2 * 16 * kBlockN * 4; }

  // Two to four steps in flight, as many as fit the 99 KiB of an sm_89; then two blocks share the 227 KiB of an sm_90.
  constexpr int down_stages() const {
    const int room = holds_h() ? (99 * 1024 - h_bytes()) / down_stage_bytes() : 2;
    return room < 2 ? 2 : room > 4 ? 4 : room;
  }
  constexpr int up_stages() const { return 3; }

  constexpr int up_bytes() const { return up_stages() * up_stage_bytes() + staging_bytes(); }
  constexpr int expand_bytes() const { return h_bytes() + up_bytes(); }  // of a kernel that has no first stage

  // Panels of x and down, then in the same place panels of up and the staged sums.
  constexpr int shared_bytes() const {
    const int down = holds_h() ? down_stages() * down_stage_bytes() : 0;
    return h_bytes() + (down > up_bytes() ? down : up_bytes());
  }

  constexpr bool operator==(const LinearTile& other) const {
    return block_m == other.block_m && max_rank == other.max_rank && form == other.form;
  }
};

inline constexpr std::array<LinearTile, 17> kLinearTiles{{
    {32, 64},
    {32, 96},
    {32, 128},
    {32, 192},
    {32, 256},
    {64, 0},
    {64, 64},
    {64, 96},
    {64, 128},
    {64, 192},
    {64, 256},
    {128, 0},
    {128, 64},
    {128, 96},
    {128, 128},
    {128, 192},
    {128, 256},
}};

// Of pivoted layers.
inline constexpr std::array<LinearTile, 9> kPivotedTiles{{
    {32, 0, Form::pivoted},
    {32, 128, Form::pivoted},
    {64, 0, Form::pivoted},
    {64, 64, Form::pivoted},
    {64, 128, Form::pivoted},
    {64, 256, Form::pivoted},
    {128, 0, Form::pivoted},
    {128, 128, Form::pivoted},
    {128, 256, Form::pivoted},
}};

// Of gated layers.
inline constexpr std::array<LinearTile, 9> kGatedTiles{{
    {32, 0, Form::gated},
    {32, 128, Form::gated},
    {64, 0, Form::gated},
    {64, 64, Form::gated},
    {64, 128, Form::gated},
    {64, 256, Form::gated},
    {128, 0, Form::gated},
    {128, 128, Form::gated},
    {128, 256, Form::gated},
}};

// Those on which the backward pass is compiled. Of 128 rows, gradients beside sums need more registers than there are.
inline constexpr std::array<LinearTile, 5> kBackwardTiles{{{64, 0}, {64, 64}, {64, 96}, {64, 128}, {64, 256}}};

inline constexpr std::array<LinearTile, 4> kPivotedBackwardTiles{
    {{64, 0, Form::pivoted}, {64, 64, Form::pivoted}, {64, 128, Form::pivoted}, {64, 256, Form::pivoted}}};

inline constexpr std::array<LinearTile, 5> kGatedBackwardTiles{{{32, 0, Form::gated},
                                                                {64, 0, Form::gated},
                                                                {64, 64, Form::gated},
                                                                {64, 128, Form::gated},
                                                                {64, 256, Form::gated}}};

// How a tile covers a problem: blocks_m blocks of rows, each row block shared by blocks_n blocks, which compute the
// same h and take one run of column tiles each.
struct LinearGrid {
  LinearTile tile{};
  int64_t blocks_m = 0;
  int blocks_n = 0;
};

// Of the sums over rows that the backward kernel leaves: one for each row of warps.
constexpr int64_t backward_sum_rows(const LinearGrid& grid) { return grid.blocks_m * grid.tile.warps_m(); }

}  // namespace shrank
