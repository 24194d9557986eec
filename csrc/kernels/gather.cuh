// How windows of x become rows of a matrix (implicit GEMM): the columns are the filter's taps, of each the channels.
// Either the taps are listed beforehand, and a copy is three instructions (ListedTaps); or, for any filter and any groups,
// each place is computed when it is needed (Windows).
#pragma once

#include "low_rank_conv.h"
#include "tile.cuh"

namespace shrank {

inline constexpr int kOutside = -(1 << 30);

// A window of x: at which pixel it begins, counted from the first, and its depth, height and width there. Padding lies
// outside; a row that y does not have lies outside altogether.
struct Origin {
  int pixel, place[3];

  SHRANK_DEVICE static Origin of_row(const ConvWindow& w, int64_t row, int64_t rows) {
    Origin origin;
    int pixel = static_cast<int>(row);
#pragma unroll
    for (int i = 2; i >= 0; i--) {
      origin.place[i] = pixel % w.out[i] * w.stride[i] - w.begin[i];
      pixel /= w.out[i];
    }
    const int (&place)[3] = origin.place;
    origin.pixel = ((pixel * w.in[0] + place[0]) * w.in[1] + place[1]) * w.in[2] + place[2];
    if (row >= rows) origin.place[0] = kOutside;
    return origin;
  }

  SHRANK_DEVICE bool is_inside(int axis, int step, const ConvWindow& w) const {
    return static_cast<uint32_t>(place[axis] + step) < static_cast<uint32_t>(w.in[axis]);
  }
};

// The windows of a block's rows, in shared memory.
template <int BLOCK_M, int Threads>
SHRANK_DEVICE void find_origins(SharedAddress origins, const ConvWindow& w, int64_t row, int64_t rows) {
  for (int at = arch::thread_index(); at < BLOCK_M; at += Threads) {
    const Origin origin = Origin::of_row(w, row + at, rows);
    arch::store_shared(
        origins + at * 16,
        arch::Pack<uint32_t, 4>{{static_cast<uint32_t>(origin.pixel), static_cast<uint32_t>(origin.place[0]),
                                 static_cast<uint32_t>(origin.place[1]), static_cast<uint32_t>(origin.place[2])}});
  }
}

// A filter's taps, listed in shared memory: how far each lies from a window's origin, in pixels, and a bit for each of its
// coordinates; and the windows of a block's rows, with the bits of the coordinates at which they are outside of x. An
// axis with one tap has no bit, but for the last: a window outside of it is outside altogether. The taps behind the last
// have a bit that is outside of every window.
template <int BLOCK_M, int Threads> struct ListedTaps {
  static constexpr uint32_t kNowhere = 1u << kListedCoordinates;
  SharedAddress windows, list;

  SHRANK_DEVICE void write(const ConvWindow& w, int64_t row, int64_t rows) const {
    for (int at = arch::thread_index(); at < BLOCK_M; at += Threads) {
      const Origin origin = Origin::of_row(w, row + at, rows);
      uint32_t outside = kNowhere, bit = 1;
#pragma unroll
      for (int axis = 2; axis >= 0; axis--) {
        if (!has_bits(w, axis)) {
          if (!origin.is_inside(axis, 0, w)) outside = ~0u;
          continue;
        }
        for (int tap = 0; tap < w.kernel[axis]; tap++, bit <<= 1)
          if (!origin.is_inside(axis, tap * w.dilation[axis], w)) outside |= bit;
      }
      arch::store_shared(windows + at * 8, arch::Pack<uint32_t, 2>{{static_cast<uint32_t>(origin.pixel), outside}});
    }
    for (int i = arch::thread_index(); i < w.taps() + kPanelChunks; i += Threads) {
      const int at[] = {i / w.kernel[2] / w.kernel[1], i / w.kernel[2] % w.kernel[1], i % w.kernel[2]};
      const int pixels = (at[0] * w.dilation[0] * w.in[1] + at[1] * w.dilation[1]) * w.in[2] + at[2] * w.dilation[2];
      uint32_t bits = 0;
#pragma unroll
      for (int axis = 2, first = 0; axis >= 0; axis--) {
        if (!has_bits(w, axis)) continue;
        bits |= 1u << (first + at[axis]);
        first += w.kernel[axis];
      }
      arch::store_shared(list + i * 8,
                         arch::Pack<uint32_t, 2>{{static_cast<uint32_t>(pixels), i < w.taps() ? bits : kNowhere}});
    }
  }

  SHRANK_DEVICE static bool has_bits(const ConvWindow& w, int axis) { return axis == 2 || w.kernel[axis] > 1; }
};

// The steps of a first stage whose taps are listed: 64 columns at a time, tap after tap, of each `run_channels` channels.
// A thread has the same chunk of 8 columns in all rows.
template <typename T, int BLOCK_M, int MAX_RANK, int Threads> class ListedWalk {
  using Rows = PanelRows<BLOCK_M, Threads>;
  using Filters = PanelRows<MAX_RANK, Threads>;

 public:
  SHRANK_DEVICE ListedWalk(const LowRankConvParams& params, const ListedTaps<BLOCK_M, Threads>& taps, int group)
      : filters_(params.R),
        stride_(params.channels * static_cast<int>(sizeof(T))),
        filter_stride_(params.K * static_cast<int>(sizeof(T))),
        group_channels_(params.group_channels),
        run_(params.run_channels),
        steps_(ceil_div(params.window.taps() * params.run_channels, kPanel)),
        first_tap_(taps.list + Rows::chunk() * kChunk / run_ * 8),
        end_(taps.list + params.window.taps() * 8),
        x_(static_cast<const T*>(params.x) + group * params.R / params.down_rank * group_channels_),
        down_(static_cast<const T*>(params.down) + static_cast<int64_t>(group) * params.R * params.K) {
    const int first = arch::thread_index() / kPanelChunks;
#pragma unroll
    for (int i = 0; i < Rows::kCopies; i++) {
      const arch::Pack<uint32_t, 2> window = arch::load_shared_pair(taps.windows + (first + i * Rows::kRowsAtOnce) * 8);
      pixel_[i] = static_cast<int>(window.item[0]);
      outside_[i] = window.item[1];
    }
    restart();
  }

  // Starts the copies of the next step; unless `go`, none.
  SHRANK_DEVICE void load(SharedAddress x_panel, SharedAddress down_panel, bool go) {
    const arch::Pack<uint32_t, 2> tap = arch::load_shared_pair(tap_);
    const char* const from = arch::multiply_add_wide(static_cast<int>(tap.item[0]), stride_,
                                                     reinterpret_cast<const char*>(x_ + channel_));
    const int apart = go ? stride_ : 0;  // no constant of the loop: as in PanelRows
#pragma unroll
    for (int i = 0; i < Rows::kCopies; i++)  // neighbouring windows overlap: most of what a tap reads another has read
      arch::copy_async_reused_if(go, x_panel + filters_.place + i * Rows::kRowsAtOnce * kPanelRow,
                                 from + arch::multiply_wide(pixel_[i], apart), outside_[i] & tap.item[1] ? 0 : 16);
    filters_.load(down_panel, reinterpret_cast<const char*>(down_ + of_filter_), filter_stride_, tap_ < end_, go);
    advance();
  }

 private:
  SHRANK_DEVICE void restart() {
    left_ = steps_;
    channel_ = Rows::chunk() * kChunk % run_;
    tap_ = first_tap_;
    of_filter_ = Rows::chunk() * kChunk / run_ * group_channels_ + channel_ + before_;
  }

  SHRANK_DEVICE void advance() {
    channel_ += kPanel % run_;
    tap_ += kPanel / run_ * 8;
    of_filter_ += kPanel % run_ + kPanel / run_ * group_channels_;
    if (channel_ >= run_) channel_ -= run_, tap_ += 8, of_filter_ += group_channels_ - run_;
    if (--left_) return;
    x_ += run_;  // the next run of channels
    before_ += run_;
    restart();
  }

  const Filters filters_;
  const int stride_, filter_stride_, group_channels_, run_, steps_;
  const SharedAddress first_tap_, end_;
  const T *x_, *down_;
  int pixel_[Rows::kCopies];
  uint32_t outside_[Rows::kCopies];
  int left_, channel_, of_filter_;
  int before_ = 0;  // channels of the runs before
  SharedAddress tap_;
};

// A place in a filter: a tap, which of them, and a channel.
struct Tap {
  int channel = 0, index = 0, at[3] = {};

  SHRANK_DEVICE void advance(const ConvWindow& w, int channels, int by) {
    for (channel += by; channel >= channels; channel -= channels) next(w);
  }

  SHRANK_DEVICE void next(const ConvWindow& w) {
    index++;
    if (++at[2] < w.kernel[2]) return;
    at[2] = 0;
    if (++at[1] < w.kernel[1]) return;
    at[1] = 0;
    ++at[0];
  }
};

// A tap as seen from the origin of a window.
struct Reach {
  int step[3], pixels;
  bool in_filter;

  SHRANK_DEVICE Reach(const Tap& tap, const ConvWindow& w)
      : step{tap.at[0] * w.dilation[0], tap.at[1] * w.dilation[1], tap.at[2] * w.dilation[2]},
        pixels((step[0] * w.in[1] + step[1]) * w.in[2] + step[2]),
        in_filter(tap.at[0] < w.kernel[0]) {}

  // Whether the tap of the window that begins at `origin` is in the image, and at which pixel.
  SHRANK_DEVICE bool is_inside(const arch::Pack<uint32_t, 4>& origin, const ConvWindow& w) const {
    return in_filter && origin.item[1] + step[0] < static_cast<uint32_t>(w.in[0]) &&
           origin.item[2] + step[1] < static_cast<uint32_t>(w.in[1]) &&
           origin.item[3] + step[2] < static_cast<uint32_t>(w.in[2]);
  }
  SHRANK_DEVICE int64_t pixel(const arch::Pack<uint32_t, 4>& origin) const {
    return static_cast<int>(origin.item[0]) + pixels;
  }
};

// Walks a matrix of windows and that of the filters, 64 columns a step: tap after tap, of each `run_channels` channels.
template <typename T, Gather HOW, int Rows, int Threads> struct Windows {
  static constexpr int kRowsAtOnce = Threads / kPanelChunks;
  static_assert(Rows % kRowsAtOnce == 0);

  const LowRankConvParams& params;
  const SharedAddress origins;
  Tap tap{};

  // To the first column. A thread has the same chunk of 8 columns in all rows.
  SHRANK_DEVICE void restart() {
    tap = {};
    tap.advance(params.window, params.run_channels, arch::thread_index() % kPanelChunks * kChunk);
  }

  SHRANK_DEVICE void advance() { tap.advance(params.window, params.run_channels, kPanel); }

  // Of the channels of x from this one on.
  SHRANK_DEVICE void load(SharedAddress panel, int channel) const {
    const T* const x = static_cast<const T*>(params.x) + channel;
    if constexpr (HOW == Gather::analytic) copy_chunks(panel, x);
    else read_numbers(panel, x);
  }

  // Of the channels of the filters from this one on: the rows that multiply_panels loads to multiply [begin, rows).
  SHRANK_DEVICE void load_down(SharedAddress panel, const Matrix<T>& down, int begin, int channel) const {
    if constexpr (HOW == Gather::analytic) copy_down(panel, down, begin, channel);
    else read_down(panel, down, begin, channel);
  }

  SHRANK_DEVICE void copy_chunks(SharedAddress panel, const T* x) const {
    const int first = arch::thread_index() / kPanelChunks, chunk = arch::thread_index() % kPanelChunks;
    const Reach reach(tap, params.window);
#pragma unroll 4
    for (int i = 0; i < Rows; i += kRowsAtOnce) {
      const arch::Pack<uint32_t, 4> origin = arch::load_shared_words(origins + (first + i) * 16);
      const bool inside = reach.is_inside(origin, params.window);
      const T* const from = x + tap.channel + reach.pixel(origin) * params.channels;
      // Neighbouring windows overlap: most of what one tap reads another has read.
      arch::copy_async_reused(chunk_at(panel, first + i, chunk), inside ? from : x, inside ? 16 : 0);
    }
  }

  SHRANK_DEVICE void read_numbers(SharedAddress panel, const T* x) const {
    const int first = arch::thread_index() / kPanelChunks, chunk = arch::thread_index() % kPanelChunks;
#pragma unroll 1
    for (int i = 0; i < Rows; i += kRowsAtOnce) {
      const arch::Pack<uint32_t, 4> origin = arch::load_shared_words(origins + (first + i) * 16);
      Tap at = tap;
      write_chunk(chunk_at(panel, first + i, chunk), [&](int) {
        const Reach reach(at, params.window);
        const T* const from = x + at.channel + reach.pixel(origin) * params.channels;
        at.advance(params.window, params.run_channels, 1);
        return reach.is_inside(origin, params.window) ? arch::load<T, 1>(from).item[0] : T{};
      });
    }
  }

  SHRANK_DEVICE void copy_down(SharedAddress panel, const Matrix<T>& down, int begin, int channel) const {
    const int first = arch::thread_index() / kPanelChunks, chunk = arch::thread_index() % kPanelChunks;
    const bool in_filter = tap.at[0] < params.window.kernel[0];
    const T* const from = down.data + tap.index * params.group_channels + channel + tap.channel;
#pragma unroll 4
    for (int row = first_row(begin) + first; row < end_row(down); row += kRowsAtOnce) {
      const bool inside = in_filter && row < down.rows;
      arch::copy_async(chunk_at(panel, row, chunk), inside ? from + static_cast<int64_t>(row) * down.columns : from,
                       inside ? 16 : 0);
    }
  }

  SHRANK_DEVICE void read_down(SharedAddress panel, const Matrix<T>& down, int begin, int channel) const {
    const int first = arch::thread_index() / kPanelChunks, chunk = arch::thread_index() % kPanelChunks;
#pragma unroll 1
    for (int row = first_row(begin) + first; row < end_row(down); row += kRowsAtOnce) {
      const bool exists = row < down.rows;
      Tap at = tap;
      write_chunk(chunk_at(panel, row, chunk), [&](int) {
        const bool inside = exists && at.at[0] < params.window.kernel[0];
        const T* const from = down.data + static_cast<int64_t>(row) * down.columns + at.index * params.group_channels +
                              channel + at.channel;
        at.advance(params.window, params.run_channels, 1);
        return inside ? arch::load<T, 1>(from).item[0] : T{};
      });
    }
  }

  SHRANK_DEVICE static int first_row(int begin) { return begin / 16 * 16; }
  SHRANK_DEVICE static int end_row(const Matrix<T>& down) { return ceil_div(static_cast<int>(down.rows), 16) * 16; }

  // Of the numbers next(0), ..., next(7), asked for in order.
  template <typename Next> SHRANK_DEVICE static void write_chunk(SharedAddress to, const Next& next) {
    arch::Pack<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t low = next(2 * i).bits, high = next(2 * i + 1).bits;
      words.item[i] = low | high << 16;
    }
    arch::store_shared(to, words);
  }
};

}  // namespace shrank
