// How windows of x become rows of a matrix (implicit GEMM): the columns are the filter's taps, of each the channels.
#pragma once

#include "low_rank_conv.h"
#include "tile.cuh"

namespace shrank {

// The window of each row of a block, in shared memory: at which pixel of x it begins, counted from the first, and its
// depth, height and width there. Padding lies outside; a row that y does not have lies outside altogether.
template <int BLOCK_M, int Threads>
SHRANK_DEVICE void find_origins(SharedAddress origins, const ConvWindow& w, int64_t row, int64_t rows) {
  constexpr int kOutside = -(1 << 30);
  for (int at = arch::thread_index(); at < BLOCK_M; at += Threads) {
    int pixel = static_cast<int>(row) + at;
    const bool exists = row + at < rows;
    int place[3];
#pragma unroll
    for (int i = 2; i >= 0; i--) {
      place[i] = pixel % w.out[i] * w.stride[i] - w.begin[i];
      pixel /= w.out[i];
    }
    const int first = ((pixel * w.in[0] + place[0]) * w.in[1] + place[1]) * w.in[2] + place[2];
    arch::store_shared(
        origins + at * 16,
        arch::Pack<uint32_t, 4>{{static_cast<uint32_t>(first), static_cast<uint32_t>(exists ? place[0] : kOutside),
                                 static_cast<uint32_t>(place[1]), static_cast<uint32_t>(place[2])}});
  }
}

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
    if constexpr (HOW == Gather::chunks) copy_chunks(panel, x);
    else read_numbers(panel, x);
  }

  // Of the channels of the filters from this one on: the rows that multiply_panels loads to multiply [begin, rows).
  SHRANK_DEVICE void load_down(SharedAddress panel, const Matrix<T>& down, int begin, int channel) const {
    if constexpr (HOW == Gather::chunks) copy_down(panel, down, begin, channel);
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
