// Shared memory, barriers and positions: arch/shared.cuh, arch/sync.cuh, arch/position.cuh.
#pragma once

#include "../arch/shared.cuh"
#include "../arch/sync.cuh"
#include "case.cuh"

namespace shrank::conformance {

// 16 bytes for each thread of a warp.
inline constexpr int kBehind = 48;  // an offset that is part of the instruction
inline constexpr int kChunkWords = 4, kWarpWords = kWarp * kChunkWords, kWarpBytes = kWarpWords * 4;

// Word i of the block's input to word i of its shared memory.
SHRANK_DEVICE void fill_shared(const Params& params, int words) {
  const arch::SharedAddress shared = arch::dynamic_shared();
  for (int i = arch::lane_index(); i < words; i += kWarp)
    arch::store_shared<kBehind>(shared + i * 4 - kBehind, words_in(params)[i]);
  arch::sync_warp();
}

// Each thread reads the 16 bytes of its opposite, so that the words of four threads must be there.
struct LoadSharedWords : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    fill_shared(params, kWarpWords);
    const int thread = arch::thread_index();
    arch::store(words_out(params) + thread * kChunkWords,
                arch::load_shared_words<kBehind>(arch::dynamic_shared() + (kWarp - 1 - thread) * 16 - kBehind));
  }
};

struct LoadSharedFloats : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress shared = arch::dynamic_shared();
    for (int half = 0; half < 2; half++) {
      const int pair = half * kWarp + thread;
      arch::store_shared(shared + pair * 8, arch::load<float, 2>(input<float>(params) + pair * 2));
    }
    arch::sync_warp();
    arch::store(output<float>(params) + thread * kChunkWords,
                arch::load_shared_floats(shared + (kWarp - 1 - thread) * 16));
  }
};

struct StoreSharedWords : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    arch::store_shared(arch::dynamic_shared() + thread * 16,
                       arch::load<uint32_t, 4>(words_in(params) + thread * kChunkWords));
    arch::sync_warp();
    arch::store(words_out(params) + thread * kChunkWords,
                arch::load_shared_words(arch::dynamic_shared() + (kWarp - 1 - thread) * 16));
  }
};

enum class Copy { plain, reused, conditional, reused_conditional };

struct SharedPairs : Case<Inputs::bits, kWarp, kWarp * 2, kWarp * 2, kWarp * 8> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress shared = arch::dynamic_shared();
    arch::store_shared(shared + thread * 8, arch::load<uint32_t, 2>(words_in(params) + thread * 2));
    arch::sync_warp();
    arch::store(words_out(params) + thread * 2, arch::load_shared_pair(shared + (kWarp - 1 - thread) * 8));
  }
};

struct StoreSharedFloats : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress shared = arch::dynamic_shared();
    arch::store_shared(shared + thread * 16, arch::load<float, 4>(input<float>(params) + thread * 4));
    arch::sync_warp();
    arch::store(words_out(params) + thread * 4, arch::load_shared_words(shared + (kWarp - 1 - thread) * 16));
  }
};

// Two groups of a chunk each. In both, odd threads pass 0 valid bytes and an address that cannot be read.
template <Copy HOW> struct CopyAsync : Case<Inputs::bits, kWarp, 2 * kWarpWords, 2 * kWarpWords, 2 * kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress first = arch::dynamic_shared() + thread * 16, second = first + kWarpBytes;
    const uint32_t* from = thread % 2 ? nullptr : words_in(params) + thread * kChunkWords;
    const int valid = thread % 2 ? 0 : 16;
    copy(first, from, valid);
    arch::copy_async_commit();
    copy(second, from ? from + kWarpWords : nullptr, valid);
    arch::copy_async_commit();
    arch::copy_async_wait<1>();
    arch::store(words_out(params) + thread * kChunkWords, arch::load_shared_words(first));
    arch::copy_async_wait<0>();
    arch::store(words_out(params) + kWarpWords + thread * kChunkWords, arch::load_shared_words(second));
  }

  SHRANK_DEVICE static void copy(arch::SharedAddress to, const void* from, int valid) {
    if constexpr (HOW == Copy::reused) arch::copy_async_reused(to, from, valid);
    if constexpr (HOW == Copy::plain) arch::copy_async(to, from, valid);
    if constexpr (HOW == Copy::conditional) {
      arch::copy_async_if(true, to, from, valid);
      arch::copy_async_if(false, to, nullptr, 16);  // neither reads nor writes
    }
    if constexpr (HOW == Copy::reused_conditional) {
      arch::copy_async_reused_if(true, to, from, valid);
      arch::copy_async_reused_if(false, to, nullptr, 16);
    }
  }
};

// Four warps, each thread reads what the opposite one wrote.
struct SyncThreads : Case<Inputs::bits, 128, 128, 128 * kChunkWords, 128 * 16> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const arch::SharedAddress shared = arch::dynamic_shared();
    for (int i = 0; i < kChunkWords; i++)
      arch::store_shared(shared + thread * 16 + i * 4, words_in(params)[thread] + static_cast<uint32_t>(i));
    arch::sync_threads();
    arch::store(words_out(params) + thread * kChunkWords, arch::load_shared_words(shared + (127 - thread) * 16));
  }
};

// Nothing to see of these in a grid that was not launched behind another, but that they return.
struct GridDependency : Case<Inputs::bits, kWarp, kWarp, kWarp> {
  SHRANK_DEVICE static void run(const Params& params) {
    arch::grid_dependency_wait();
    words_out(params)[arch::thread_index()] = words_in(params)[arch::thread_index()];
    arch::grid_dependency_launch();
  }
};

struct Positions : Case<Inputs::bits, 64, 1, 6 * 64 * 10> {
  static constexpr int kBlocksX = 2, kBlocksY = 3;

  SHRANK_DEVICE static void run(const Params& params) {
    const int block = arch::block_y() * kBlocksX + arch::block_x();
    uint32_t* out = words_out(params) + (block * kThreads + arch::thread_index()) * 10;
    const arch::Position position = arch::position();
    const int64_t found[10] = {position.column,      position.row,       position.columns,   position.rows,
                               arch::thread_index(), arch::lane_index(), arch::warp_index(), arch::block_x(),
                               arch::block_y(),      arch::blocks_y()};
    for (int i = 0; i < 10; i++) out[i] = static_cast<uint32_t>(found[i]);
  }
};

}  // namespace shrank::conformance
