// The steps of which the matrix kernels are made: panels in shared memory, a pipeline of them, products of panels, and
// sums on their way to global memory.
#pragma once

#include <climits>

#include "../arch/matrix.cuh"
#include "../arch/position.cuh"
#include "../arch/sync.cuh"
#include "../select/linear_tile.h"

namespace shrank {

using arch::SharedAddress;

inline constexpr int kPanel = LinearTile::kPanel, kPanelRow = LinearTile::kPanelRow;
inline constexpr int kChunk = 8;                            // numbers of 16 bytes
inline constexpr int kPanelChunks = kPanel / kChunk;        // of a row
static_assert(kPanel * 2 == kPanelRow && kPanelChunks == 8);

SHRANK_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
SHRANK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// Row-major and contiguous; the number of columns is a multiple of kChunk.
template <typename T> struct Matrix {
  const T* data;
  int64_t rows;
  int columns;
};

// A panel is some rows of 64 columns. The chunks of a row are permuted by the row number, so that the same chunk of 8
// neighbouring rows, which is what load_matrices reads at a time, lies in 8 different groups of banks.
SHRANK_DEVICE SharedAddress chunk_at(SharedAddress panel, int row, int chunk) {
  return panel + row * kPanelRow + ((chunk ^ (row & (kPanelChunks - 1))) * 16);  // & and not %: rows are not negative
}

// Starts to copy rows [row, row + Rows) and columns [column, column + 64) into a panel. Columns beyond the matrix are
// zero. Rows beyond it repeat its last, so that a copy is an address and an instruction: what is multiplied with them is
// not used, or set to zero after.
template <int Rows, int Threads, typename T>
SHRANK_DEVICE void load_panel(SharedAddress panel, const Matrix<T>& from, int64_t row, int column) {
  constexpr int kRowsAtOnce = Threads / kPanelChunks;
  static_assert(Rows % kRowsAtOnce == 0);
  const int first = arch::thread_index() / kPanelChunks, chunk = arch::thread_index() % kPanelChunks;
  const int last = static_cast<int>(from.rows - row < Rows ? from.rows - row : Rows) - 1;
  const bool inside = column + chunk * kChunk < from.columns;
  const T* const source = from.data + row * from.columns + (inside ? column + chunk * kChunk : 0);
#pragma unroll
  for (int i = 0; i < Rows; i += kRowsAtOnce)
    arch::copy_async(chunk_at(panel, first + i, chunk),
                     source + arch::multiply_wide(min_of(first + i, last), from.columns), inside ? 16 : 0);
}

// Slots of shared memory that panels pass through: `load(i, slot)` starts the copies of step i.
template <int Stages, int StageBytes> struct Pipeline {
  static_assert(Stages >= 2);
  SharedAddress base;
  int steps;

  SHRANK_DEVICE SharedAddress slot(int step) const { return base + step % Stages * StageBytes; }

  template <typename Load> SHRANK_DEVICE void start(const Load& load) const {
#pragma unroll
    for (int step = 0; step < Stages - 1; step++) {
      if (step < steps) load(step, slot(step));
      arch::copy_async_commit();
    }
  }

  // The panels of `step` are there for all threads. The barrier also says that all are done with the step before, whose
  // slot takes the next copies. Every step closes one group, maybe an empty one: the count of pending groups is fixed.
  template <typename Load> SHRANK_DEVICE SharedAddress advance(int step, const Load& load) const {
    arch::copy_async_wait<Stages - 2>();
    arch::sync_threads();
    const int next = step + Stages - 1;
    if (next < steps) load(next, slot(next));
    arch::copy_async_commit();
    return slot(step);
  }
};

// What a warp sums up: 16 FragmentsM rows by 8 FragmentsN columns, as arch::multiply_add deals them to the lanes.
template <int FragmentsM, int FragmentsN> struct Sums {
  static constexpr int kRows = 16 * FragmentsM, kColumns = 8 * FragmentsN;
  static_assert(FragmentsN % 2 == 0);
  float item[FragmentsM][FragmentsN][4] = {};
};

// Which rows of b a product takes, by eights.
struct AllRows {
  SHRANK_DEVICE static constexpr bool take_part(int) { return true; }
};
struct SomeRows {
  int begin = 0, end = INT_MAX;
  SHRANK_DEVICE bool take_part(int first) const { return begin <= first && first < end; }
};

// sums += a b^T over 16 `steps` columns of two panels; the warp's rows of a begin at a_row, those of b at b_row. The sums
// of rows of b that do not take part stay as they are: zero times infinity must not reach those of other groups.
template <typename T, int FragmentsM, int FragmentsN, typename Rows = AllRows>
SHRANK_DEVICE void multiply_panels(Sums<FragmentsM, FragmentsN>& sums, SharedAddress a_panel, int a_row,
                                   SharedAddress b_panel, int b_row, int steps = kPanel / 16, const Rows& rows = {}) {
  const int lane = arch::lane_index();
  const int a_lane_row = lane % 16, a_lane_chunk = lane / 16;  // matrices: rows, then columns
  const int b_lane_row = lane % 8 + lane / 16 * 8, b_lane_chunk = lane / 8 % 2;  // matrices: columns, then rows
#pragma unroll
  for (int step = 0; step < kPanel / 16; step++) {
    if (step >= steps) break;
    uint32_t a[FragmentsM][4];
#pragma unroll
    for (int m = 0; m < FragmentsM; m++)
      arch::load_matrices(a[m], chunk_at(a_panel, a_row + m * 16 + a_lane_row, step * 2 + a_lane_chunk));
#pragma unroll
    for (int n = 0; n < FragmentsN; n += 2) {
      const bool first = rows.take_part(b_row + n * 8), second = rows.take_part(b_row + (n + 1) * 8);
      if (!first && !second) continue;
      uint32_t b[4];
      arch::load_matrices(b, chunk_at(b_panel, b_row + n * 8 + b_lane_row, step * 2 + b_lane_chunk));
#pragma unroll
      for (int m = 0; m < FragmentsM; m++) {
        if (first) arch::multiply_add<T>(sums.item[m][n], a[m], b[0], b[1]);
        if (second) arch::multiply_add<T>(sums.item[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The sums, rounded, into panels that lie `panel_bytes` apart, from `row` and `column` on. Columns from `columns` on are
// zero: their sums are products with zeros, and NaN where a row holds infinity.
template <typename T, int FragmentsM, int FragmentsN>
SHRANK_DEVICE void round_into_panels(SharedAddress panels, int panel_bytes, const Sums<FragmentsM, FragmentsN>& sums,
                                     int row, int column, int columns) {
  const int lane = arch::lane_index();
#pragma unroll
  for (int m = 0; m < FragmentsM; m++) {
#pragma unroll
    for (int n = 0; n < FragmentsN; n++) {
      const int first = column + n * 8, at = row + m * 16 + lane / 4;
      const SharedAddress panel = panels + first / kPanel * panel_bytes;
      const int chunk = first % kPanel / kChunk, within = lane % 4 * 4;
      const float (&sum)[4] = sums.item[m][n];
      const uint32_t upper = arch::round_to_pair<T>(sum[0], sum[1]), lower = arch::round_to_pair<T>(sum[2], sum[3]);
      arch::store_shared(chunk_at(panel, at, chunk) + within, first < columns ? upper : 0);
      arch::store_shared(chunk_at(panel, at + 8, chunk) + within, first < columns ? lower : 0);
    }
  }
}

// 8 neighbouring fp32 numbers in two accesses, of which `half` comes first.
SHRANK_DEVICE void load_eight(float (&values)[kChunk], SharedAddress at, int half) {
  const arch::Pack<float, 4> first = arch::load_shared_floats(at + half * 16);
  const arch::Pack<float, 4> second = arch::load_shared_floats(at + (1 - half) * 16);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[i] = half ? second.item[i] : first.item[i];
    values[i + 4] = half ? first.item[i] : second.item[i];
  }
}

// Rows and columns change hands: from the fragments of multiply_add to 8 neighbouring columns a lane, which is one
// access of 16 bytes when they are rounded. 16 rows of the warp at a time pass through its part of shared memory, in
// fp32; a row's pieces of 8 columns are permuted by the row, and halves of pieces are read in an order of the lane's,
// so that no access has a bank conflict.
// visit(row, values) gets the row, counted from the warp's first; the columns are those of chunk_column().
template <int FragmentsN> SHRANK_DEVICE int chunk_column() { return arch::lane_index() % FragmentsN * kChunk; }

template <int FragmentsM, int FragmentsN, typename Visit>
SHRANK_DEVICE void for_each_chunk(SharedAddress staging, const Sums<FragmentsM, FragmentsN>& sums, const Visit& visit) {
  constexpr int kColumns = 8 * FragmentsN, kRowsAtOnce = arch::kWarpSize / FragmentsN;
  static_assert(FragmentsN == 4 || FragmentsN == 8);
  const auto piece_at = [&](int row, int piece) { return staging + (row * kColumns + (piece ^ (row % 4)) * 8) * 4; };
  const int lane = arch::lane_index();
#pragma unroll
  for (int m = 0; m < FragmentsM; m++) {
    arch::sync_warp();  // the rows before have been read
#pragma unroll
    for (int n = 0; n < FragmentsN; n++) {
      const float (&sum)[4] = sums.item[m][n];
      const int row = lane / 4, within = lane % 4 * 8;
      arch::store_shared(piece_at(row, n) + within, arch::Pack<float, 2>{{sum[0], sum[1]}});
      arch::store_shared(piece_at(row + 8, n) + within, arch::Pack<float, 2>{{sum[2], sum[3]}});
    }
    arch::sync_warp();
    const int piece = lane % FragmentsN, half = lane / 4 % 2;
#pragma unroll 1
    for (int row = lane / FragmentsN; row < 16; row += kRowsAtOnce) {
      float values[kChunk];
      load_eight(values, piece_at(row, piece), half);
      visit(m * 16 + row, values);
    }
  }
}

}  // namespace shrank
