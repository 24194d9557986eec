// y = activation(h up^T + bias) + residual with h the convolution of each channel of x with a filter of its own: in
// fp32, 8 channels a thread, straight into the panels that the second stage reads.
#pragma once

#include "expand.cuh"
#include "gather.cuh"

namespace shrank {

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

template <typename T, int BLOCK_M, int MAX_RANK> struct LowRankDepthwise {
  using Params = LowRankConvParams;
  using Block = shrank::Block<T, BLOCK_M, MAX_RANK, Params, true>;
  static constexpr ConvTile kTile{Gather::depthwise, {BLOCK_M, MAX_RANK}};
  static constexpr int kThreads = Block::kThreads, kSharedBytes = kTile.shared_bytes(), kOrigins = kTile.origins();
  static constexpr int kRowsAtOnce = kThreads / kPanelChunks, kRows = BLOCK_M / kRowsAtOnce;  // kRows: of a thread
  static_assert(BLOCK_M % kRowsAtOnce == 0 && ConvTile::kMostTaps * kPanel * 4 <= kTile.tile.up_bytes());

  SHRANK_DEVICE static void run(const Params& params) {
    const Block block = Block::here(params);
    if (block.is_idle()) return;
    const SharedAddress origins = arch::dynamic_shared() + kOrigins;
    find_origins<BLOCK_M, kThreads>(origins, params.window, block.row, params.M);
    arch::grid_dependency_wait();
    for (int first = 0; first < params.R; first += kPanel) {
      arch::sync_threads();  // all are done with the filters before
      load_filters(block, first);
      arch::sync_threads();
      convolve(block, origins, first);
    }
    arch::sync_threads();  // panels of up take the place of the filters
    block.template expand<false>([&] {
      if (params.h && block.share == 0) block.save_h();
    });
  }

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
      arch::store_shared(block.slots + i * 8, pair);
    }
  }

  // 64 columns of h, from the channels `first` on of the group.
  SHRANK_DEVICE static void convolve(const Block& block, SharedAddress origins, int first) {
    const Params& params = block.params;
    const int chunk = arch::thread_index() % kPanelChunks, row = arch::thread_index() / kPanelChunks;
    const int column = first + chunk * kChunk, channel = block.group * params.R + column;
    const bool exists = column < params.R;
    const T* const x = static_cast<const T*>(params.x) + channel;
    float sums[kRows][kChunk] = {};
    Tap tap;
#pragma unroll 1
    for (int i = 0; i < params.K; i++, tap.next(params.window)) {
      float filter[kChunk];
      load_eight(filter, block.slots + (i * kPanel + chunk * kChunk) * 4, chunk / 4);
      const Reach reach(tap, params.window);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const arch::Pack<uint32_t, 4> origin = arch::load_shared_words(origins + (row + r * kRowsAtOnce) * 16);
        if (!exists || !reach.is_inside(origin, params.window)) continue;
        const arch::Pack<T, kChunk> pixel = arch::load<T, kChunk>(x + reach.pixel(origin) * params.channels);
#pragma unroll
        for (int c = 0; c < kChunk; c++) sums[r][c] += filter[c] * arch::widen(pixel.item[c]);
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
