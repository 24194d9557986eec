// The steps of which the matrix kernels are made: panels in shared memory, a pipeline of them, products of panels, and
// sums on their way to global memory.
#pragma once

#include <climits>
#include <type_traits>

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

SHRANK_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
SHRANK_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
SHRANK_DEVICE constexpr int max_of(int a, int b) { return a < b ? b : a; }

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

// A thread's part of the copies that fill a panel: its chunk of every kRowsAtOnce-th row. Rows that there are not repeat
// the last one, so that a copy is two instructions, an address and itself: what is multiplied with them is not used, or
// set to zero after.
template <int ROWS, int THREADS> struct PanelRows {
  static constexpr int kRowsAtOnce = THREADS / kPanelChunks, kCopies = ROWS / kRowsAtOnce;
  static_assert(ROWS % kRowsAtOnce == 0 && kRowsAtOnce % kPanelChunks == 0);
  int row[kCopies];
  SharedAddress place;  // of its first chunk in a panel

  SHRANK_DEVICE static int chunk() { return arch::thread_index() % kPanelChunks; }

  SHRANK_DEVICE explicit PanelRows(int64_t rows) {
    const int first = arch::thread_index() / kPanelChunks, last = (rows < ROWS ? static_cast<int>(rows) : ROWS) - 1;
    place = chunk_at(0, first, chunk());
#pragma unroll
    for (int i = 0; i < kCopies; i++) row[i] = min_of(first + i * kRowsAtOnce, last);
  }

  // Starts the copies: `from` is the thread's chunk of the first row, rows lie `stride` bytes apart. Zeros, unless the
  // chunk is `inside` the matrix; nothing, unless `go`.
  SHRANK_DEVICE void load(SharedAddress panel, const char* from, int stride, bool inside, bool go) const {
    // No constant of the loop: of one, nvcc 13.0 keeps the products in registers, and adds each in two instructions.
    const int apart = inside ? stride : 0;
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      arch::copy_async_if(go, panel + place + i * kRowsAtOnce * kPanelRow, from + arch::multiply_wide(row[i], apart),
                          inside ? 16 : 0);
  }
};

// Fills panels with ROWS rows of a matrix from `row` on, 64 columns after the other. Columns beyond the matrix are zero.
template <typename T, int ROWS, int THREADS> struct PanelLoader {
  using Rows = PanelRows<ROWS, THREADS>;
  Rows rows;
  const char* source;  // the thread's chunk of the first row
  int stride, left;  // bytes from row to row; columns from that chunk on

  SHRANK_DEVICE PanelLoader(const Matrix<T>& from, int64_t row)
      : rows(from.rows - row),
        source(reinterpret_cast<const char*>(from.data + row * from.columns + Rows::chunk() * kChunk)),
        stride(from.columns * static_cast<int>(sizeof(T))),
        left(from.columns - Rows::chunk() * kChunk) {}

  // Starts the copies of the next 64 columns; unless `go`, none.
  SHRANK_DEVICE void load(SharedAddress panel, bool go = true) {
    rows.load(panel, source, stride, left > 0, go);
    source += kPanelRow;
    left -= kPanel;
  }

  // Back by so many panels, to the first columns of the ROWS rows below, of which `exist` are there.
  SHRANK_DEVICE void restart_below(int panels, int exist) {
    source += arch::multiply_wide(ROWS, stride) - panels * kPanelRow;
    left += panels * kPanel;
    rows = Rows(exist);
  }
};

// Fills panels as PanelLoader does, with the rows of a pivoted up that ROWS neighbouring columns of y have: `order` says
// which. A column that is a pivot has none: some row takes part in vain, and its sum is not used.
template <typename T, int ROWS, int THREADS> struct PlacedLoader {
  using Rows = PanelRows<ROWS, THREADS>;
  Rows rows;
  const char* source;  // the thread's chunk of up's first row
  int stride, left, pivots, last;  // last: of up's rows
  const int32_t* order;  // of the first of the columns

  SHRANK_DEVICE PlacedLoader(const Matrix<T>& up, const int32_t* order, int exist)
      : rows(exist),
        source(reinterpret_cast<const char*>(up.data + Rows::chunk() * kChunk)),
        stride(up.columns * static_cast<int>(sizeof(T))),
        left(up.rows ? up.columns - Rows::chunk() * kChunk : 0),
        pivots(up.columns),
        last(static_cast<int>(up.rows) - 1),
        order(order) {
    look_up(exist);
  }

  SHRANK_DEVICE void load(SharedAddress panel, bool go = true) {
    rows.load(panel, source, stride, left > 0, go);
    source += kPanelRow;
    left -= kPanel;
  }

  // Back by so many panels, to the first columns of up for the ROWS columns of y behind, of which `exist` are there.
  SHRANK_DEVICE void restart_below(int panels, int exist) {
    source -= panels * kPanelRow;
    left += panels * kPanel;
    order += ROWS;
    rows = Rows(exist);
    look_up(exist);
  }

 private:
  SHRANK_DEVICE void look_up(int exist) {
#pragma unroll
    for (int i = 0; i < Rows::kCopies; i++) {
      const int place = static_cast<int>(arch::load_word_if(exist > 0, order + rows.row[i]));
      rows.row[i] = max_of(min_of(place - pivots, last), 0);
    }
  }
};

// Another matrix with as many columns, whose panels are filled at the same time.
template <typename T, int ROWS, int THREADS> struct PanelCompanion {
  using Rows = PanelRows<ROWS, THREADS>;
  Rows rows;
  const char* source;

  SHRANK_DEVICE PanelCompanion(const Matrix<T>& from, int64_t row)
      : rows(from.rows - row),
        source(reinterpret_cast<const char*>(from.data + row * from.columns + Rows::chunk() * kChunk)) {}

  // Before the other's copies of the same columns.
  template <typename Loader> SHRANK_DEVICE void load(SharedAddress panel, const Loader& with, bool go) {
    rows.load(panel, source, with.stride, with.left > 0, go);
    source += kPanelRow;
  }
  SHRANK_DEVICE void restart(int panels) { source -= panels * kPanelRow; }
};

// Slots of shared memory that panels pass through, one after the other. `load(slot, go)` starts the copies of the next
// step, or none.
template <int Stages, int StageBytes> struct Pipeline {
  static_assert(Stages >= 2);
  SharedAddress base, free;  // free: the slot that takes the next copies
  int left;  // steps to load

  template <typename Load>
  SHRANK_DEVICE Pipeline(SharedAddress base, int steps, Load& load) : base(base), free(base), left(steps) {
#pragma unroll
    for (int stage = 0; stage < Stages - 1; stage++) fill(base + stage * StageBytes, load);
    free = base + (Stages - 1) * StageBytes;
  }

  // The panels of the next step are there for all threads. The barrier also says that all are done with the step before,
  // whose slot is the free one.
  SHRANK_DEVICE SharedAddress arrive() const {
    arch::copy_async_wait<Stages - 2>();
    arch::sync_threads();
    return after(free);
  }

  // Between this step and the next arrival; `slot` is this step's, which is free then.
  template <typename Load> SHRANK_DEVICE void refill(SharedAddress slot, Load& load) {
    fill(free, load);
    free = slot;
  }

 private:
  SHRANK_DEVICE SharedAddress after(SharedAddress slot) const {
    return slot == base + (Stages - 1) * StageBytes ? base : slot + StageBytes;
  }

  // Every step closes one group, maybe an empty one: the count of pending groups is fixed.
  template <typename Load> SHRANK_DEVICE void fill(SharedAddress slot, Load& load) {
    load(slot, left > 0);
    arch::copy_async_commit();
    left--;
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
// `meanwhile` is called once, when the first products are on their way: for copies, which else would hold them up.
template <typename T, int FragmentsM, int FragmentsN, typename Rows, typename Meanwhile>
SHRANK_DEVICE void multiply_panels(Sums<FragmentsM, FragmentsN>& sums, SharedAddress a_panel, int a_row,
                                   SharedAddress b_panel, int b_row, int steps, const Rows& rows,
                                   const Meanwhile& meanwhile) {
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
    if (step == 0) meanwhile();
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

// Calls visit with 0, 1, ..., as types: what depends on them is part of the instructions.
template <int COUNT, int I = 0, typename Visit> SHRANK_DEVICE void for_constants(const Visit& visit) {
  if constexpr (I < COUNT) {
    visit(std::integral_constant<int, I>{});
    for_constants<COUNT, I + 1>(visit);
  }
}

template <typename T> SHRANK_DEVICE void add_pair(float& low, float& high, uint32_t pair) {
  const arch::Pack<float, 2> wide = arch::widen_pair<T>(pair);
  low += wide.item[0], high += wide.item[1];
}

// One of four numbers that came in two words.
template <typename T> SHRANK_DEVICE float number_of_pair(const arch::Pack<uint32_t, 2>& words, int number) {
  const arch::Pack<float, 2> two = arch::widen_pair<T>(number < 2 ? words.item[0] : words.item[1]);
  return number % 2 ? two.item[1] : two.item[0];
}

// Where sums change hands with rows of global memory: some rows of a warp's columns, rounded, in shared memory. They are
// reached by fragments, as multiply_add deals them to the lanes, or by lines, 16 bytes a lane. The chunks of a row are
// permuted as in a panel, so that neither meets a bank twice; two rows of 32 columns share 128 bytes.
template <typename T, int COLUMNS> struct Staging {
  static constexpr int kRowBytes = COLUMNS * 2;
  static constexpr int kRowChunks = COLUMNS / kChunk, kRowsAtOnce = arch::kWarpSize / kRowChunks;  // by lines
  static_assert(COLUMNS == 32 || COLUMNS == 64);
  SharedAddress base;

  SHRANK_DEVICE SharedAddress at(int row, int chunk) const {
    if constexpr (COLUMNS == 64) return chunk_at(base, row, chunk);
    else return base + row / 2 * kPanelRow + (((row % 2 * 4 + chunk) ^ (row / 2 & 3)) * 16);
  }

  // Two neighbouring fragments of sums, rounded, from row ROW on, a multiple of 16.
  template <int ROW> SHRANK_DEVICE void put(int chunk, const float (&left)[4], const float (&right)[4]) const {
    const int lane = arch::lane_index(), within = lane % 4 * 4;
    const SharedAddress first = at(lane / 4, chunk) + within, second = at(lane / 4, chunk + 1) + within;
    arch::store_shared<ROW * kRowBytes>(first, arch::round_to_pair<T>(left[0], left[1]));
    arch::store_shared<(ROW + 8) * kRowBytes>(first, arch::round_to_pair<T>(left[2], left[3]));
    arch::store_shared<ROW * kRowBytes>(second, arch::round_to_pair<T>(right[0], right[1]));
    arch::store_shared<(ROW + 8) * kRowBytes>(second, arch::round_to_pair<T>(right[2], right[3]));
  }

  // What put() would have stored of two neighbouring fragments: two pairs of the left one, then of the right one.
  SHRANK_DEVICE void get(uint32_t (&pairs)[4], int row, int chunk) const {
    const int lane = arch::lane_index();
    arch::load_matrices(pairs, at(row + lane % 16, chunk + lane / 16));
  }

  // The lane's chunk of a line. The order of the chunks repeats after 8 rows: from ROW, the first of the lines that a
  // warp reaches at once, come few addresses and a constant.
  template <int ROW> SHRANK_DEVICE SharedAddress line_start() const {
    return at(arch::lane_index() / kRowChunks + ROW % 8, arch::lane_index() % kRowChunks);
  }
  template <int ROW> static constexpr int kBelow = ROW / 8 * 8 * kRowBytes;
};

}  // namespace shrank
