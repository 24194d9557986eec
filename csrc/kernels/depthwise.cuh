// y = activation(h up^T + bias) + residual with h the convolution of each channel of x with a filter of its own: in
// fp32, 8 channels a thread, straight into the panels that the second stage reads.
#pragma once

#include "expand.cuh"
#include "gather.cuh"

namespace shrank {

template <typename T, int BLOCK_M, int MAX_RANK> struct LowRankDepthwise {
  using Params = LowRankConvParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, 1, Params, true>;
  static constexpr ConvTile kTile{Gather::depthwise, {BLOCK_M, MAX_RANK}};
  static constexpr int kThreads = Block::kThreads, kSharedBytes = kTile.shared_bytes(), kOrigins = kTile.origins(),
                       kTaps = kTile.taps();
  static constexpr int kRowsAtOnce = kThreads / kPanelChunks, kRows = BLOCK_M / kRowsAtOnce;  // kRows: of a thread
  static constexpr int kFilterRow = kPanel * 4;  // bytes: one tap of 64 channels
  static_assert(BLOCK_M % kRowsAtOnce == 0 && most_taps(Gather::depthwise) * kFilterRow <= kTile.tile.up_bytes());

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    const ListedTaps<BLOCK_M, kThreads> taps{arch::dynamic_shared() + kOrigins, arch::dynamic_shared() + kTaps};
    taps.write(params.window, block.row, params.M);
    arch::grid_dependency_wait();
    for (int first = 0; first < params.R; first += kPanel) {
      arch::sync_threads();  // all are done with the filters before
      load_filters(block, first);
      arch::sync_threads();
      convolve(block, taps, first);
    }
    arch::sync_threads();  // panels of up take the place of the filters
    block.template expand<false>([&] {
      if (params.h && block.share == 0) block.save_h(0);
    });
  }

  // Where 4 neighbouring numbers of a tap lie in its row: the first halves of all chunks, then the second, in an order in
  // which neither the stores of a warp's pairs nor the loads of its quarters meet in a bank.
  SHRANK_DEVICE static int place_of(int chunk, int half) { return half ? 128 + (chunk ^ 4) * 16 : chunk * 16; }

  // The taps of 64 channels as rows of fp32 numbers, zero for channels that there are not.
  SHRANK_DEVICE static void load_filters(const Block& block, int first) {
    const Params& params = block.params;
    const T* const filters = static_cast<const T*>(params.down);
    const int begin = block.group * params.R + first;
    for (int i = arch::thread_index(); i < params.K * kPanel / 2; i += kThreads) {
      const int tap = i / (kPanel / 2), channel = i % (kPanel / 2) * 2;
      const bool exists = first + channel < params.R;  // as does the next: R is a multiple of 8
      const T* const from = filters + static_cast<int64_t>(begin + channel) * params.K + tap;
      arch::Pack<float, 2> pair{};
      if (exists)
        pair = {{arch::widen(arch::load<T, 1>(from).item[0]), arch::widen(arch::load<T, 1>(from + params.K).item[0])}};
      const int place = place_of(channel / kChunk, channel % kChunk / 4) + channel % 4 * 4;
      arch::store_shared(block.slots + tap * kFilterRow + place, pair);
    }
  }

  // 64 columns of h, from the channels `first` on of the group. A tap's pixels are all asked for before the first is
  // used.
  SHRANK_DEVICE static void convolve(const Block& block, const ListedTaps<BLOCK_M, kThreads>& taps, int first) {
    const Params& params = block.params;
    const int chunk = arch::thread_index() % kPanelChunks, row = arch::thread_index() / kPanelChunks;
    const int column = first + chunk * kChunk, stride = params.channels * static_cast<int>(sizeof(T));
    const bool exists = column < params.R;
    const T* const channels = static_cast<const T*>(params.x) + block.group * params.R + column;
    const char* const x = exists ? reinterpret_cast<const char*>(channels) : nullptr;  // where nothing is read
    int pixel[kRows];
    uint32_t outside[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const arch::Pack<uint32_t, 2> window = arch::load_shared_pair(taps.windows + (row + r * kRowsAtOnce) * 8);
      pixel[r] = static_cast<int>(window.item[0]);
      outside[r] = exists ? window.item[1] : ~0u;
    }
    SharedAddress low = block.slots + place_of(chunk, 0), high = block.slots + place_of(chunk, 1);
    const SharedAddress end = taps.list + params.K * 8;
    float sums[kRows][kChunk] = {};
#pragma unroll 1
    for (SharedAddress at = taps.list; at < end; at += 8, low += kFilterRow, high += kFilterRow) {
      const arch::Pack<uint32_t, 2> tap = arch::load_shared_pair(at);
      // What the compiler takes for constants of the loop it keeps in registers, or adds to each address anew: a tap of
      // the filter does not have the bit, and the sum is one instruction.
      const int apart = stride ^ static_cast<int>(tap.item[1] & ListedTaps<BLOCK_M, kThreads>::kNowhere);
      const char* const from = arch::multiply_add_wide(static_cast<int>(tap.item[0]), stride, x);
      arch::Pack<uint32_t, 4> words[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++)
        words[r] = arch::load_words_if(!(outside[r] & tap.item[1]), from + arch::multiply_wide(pixel[r], apart));
      const arch::Pack<float, 4> filter[] = {arch::load_shared_floats(low), arch::load_shared_floats(high)};
#pragma unroll
      for (int r = 0; r < kRows; r++)
#pragma unroll
        for (int c = 0; c < kChunk; c += 2) {
          const arch::Pack<float, 2> pair = arch::widen_pair<T>(words[r].item[c / 2]);
          sums[r][c] = fmaf(filter[c / 4].item[c % 4], pair.item[0], sums[r][c]);
          sums[r][c + 1] = fmaf(filter[c / 4].item[c % 4 + 1], pair.item[1], sums[r][c + 1]);
        }
    }
    const SharedAddress panel = block.h_panels + first / kPanel * Block::kPanelBytes;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      arch::Pack<uint32_t, 4> words;
#pragma unroll
      for (int i = 0; i < 4; i++) words.item[i] = arch::round_to_pair<T>(sums[r][2 * i], sums[r][2 * i + 1]);
      arch::store_shared(chunk_at(panel, row + r * kRowsAtOnce, chunk), words);
    }
  }
};

}  // namespace shrank
