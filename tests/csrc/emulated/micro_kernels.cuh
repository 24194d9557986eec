// Kernels that pass 16 bytes from each thread to the next, by every way there is, right and wrong. A line that the
// report of a mistake must name ends with BUG and the kernel's name.
#pragma once

#include "../../../csrc/arch/matrix.cuh"
#include "../../../csrc/arch/position.cuh"
#include "../../../csrc/arch/sync.cuh"

namespace shrank::micro {

using arch::SharedAddress;
using Words = arch::Pack<uint32_t, 4>;

struct MicroParams {
  const uint32_t* input;
  uint32_t* output;
};

struct Micro {
  using Params = MicroParams;
  static constexpr int kThreads = 64, kBlocks = 1, kSharedBytes = 64 * 128;

  SHRANK_DEVICE static int me() { return arch::thread_index(); }
  SHRANK_DEVICE static int neighbour() { return (me() + 1) % 64; }
  SHRANK_DEVICE static SharedAddress chunk(int i) { return arch::dynamic_shared() + i * 16; }
  SHRANK_DEVICE static Words mine(const Params& p) { return arch::load<uint32_t, 4>(p.input + me() * 4); }

  SHRANK_DEVICE static void put(SharedAddress at, const Words& words) {
    for (int i = 0; i < 4; i++) arch::store_shared(at + i * 4, words.item[i]);
  }
  SHRANK_DEVICE static void keep(const Params& p, const Words& words) { arch::store(p.output + me() * 4, words); }
  SHRANK_DEVICE static void start(const Params& p, int to) { arch::copy_async(chunk(to), p.input + me() * 4, 16); }
};

#define SHRANK_MICRO(name)                                                                                             \
  struct name : Micro {                                                                                                \
    SHRANK_DEVICE static void steps(const Params& p);                                                                  \
    static void run(const Params& p) {                                                                                 \
      arch::grid_dependency_wait();                                                                                    \
      steps(p);                                                                                                        \
    }                                                                                                                  \
  };                                                                                                                   \
  SHRANK_DEVICE void name::steps([[maybe_unused]] const Params& p)

// ---- barriers

SHRANK_MICRO(through_shared) {
  put(chunk(me()), mine(p));
  arch::sync_threads();
  keep(p, arch::load_shared_words(chunk(neighbour())));
}

SHRANK_MICRO(no_barrier) {
  put(chunk(me()), mine(p));
  keep(p, arch::load_shared_words(chunk(neighbour())));  // BUG no_barrier
}

SHRANK_MICRO(warp_barrier_for_a_block) {
  put(chunk(me()), mine(p));
  arch::sync_warp();
  keep(p, arch::load_shared_words(chunk(neighbour())));  // BUG warp_barrier_for_a_block
}

SHRANK_MICRO(within_a_warp) {
  put(chunk(me()), mine(p));
  arch::sync_warp();
  keep(p, arch::load_shared_words(chunk(me() / 32 * 32 + (me() + 1) % 32)));
}

SHRANK_MICRO(no_warp_barrier) {
  put(chunk(me()), mine(p));
  keep(p, arch::load_shared_words(chunk(me() / 32 * 32 + (me() + 1) % 32)));  // BUG no_warp_barrier
}

SHRANK_MICRO(written_again_too_soon) {
  put(chunk(me()), mine(p));
  arch::sync_threads();
  keep(p, arch::load_shared_words(chunk(neighbour())));
  arch::store_shared(chunk(me()), 0u);  // BUG written_again_too_soon
}

SHRANK_MICRO(two_writers) {
  arch::store_shared(chunk(me() / 2), 0u);  // BUG two_writers
  keep(p, mine(p));
}

SHRANK_MICRO(two_barriers) {
  if (me() < 40) arch::sync_threads();
  else arch::sync_threads();  // BUG two_barriers
  keep(p, mine(p));
}

SHRANK_MICRO(skipped_barrier) {
  if (me() < 40) arch::sync_threads();  // BUG skipped_barrier
  keep(p, mine(p));
}

SHRANK_MICRO(skipped_by_lanes) {
  uint32_t fragment[4] = {};
  put(chunk(me()), mine(p));
  arch::sync_threads();
  if (me() % 32 < 16) arch::load_matrices(fragment, chunk(me() % 32));  // BUG skipped_by_lanes
  keep(p, mine(p));
}

SHRANK_MICRO(divergent_lanes) {
  uint32_t fragment[4] = {};
  put(chunk(me()), mine(p));
  arch::sync_threads();
  if (me() % 32 < 16) arch::load_matrices(fragment, chunk(me() % 32));
  else arch::load_matrices(fragment, chunk(me() % 32));  // BUG divergent_lanes
  keep(p, mine(p));
}

// ---- copies

SHRANK_MICRO(by_copies) {
  start(p, me());
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  arch::sync_threads();
  keep(p, arch::load_shared_words(chunk(neighbour())));
}

SHRANK_MICRO(read_before_the_wait) {
  start(p, me());
  arch::copy_async_commit();
  keep(p, arch::load_shared_words(chunk(me())));  // BUG read_before_the_wait
  arch::copy_async_wait<0>();
}

SHRANK_MICRO(waits_for_another_group) {
  start(p, me());
  arch::copy_async_commit();
  arch::copy_async(chunk(64 + me()), p.input, 0);
  arch::copy_async_commit();
  arch::copy_async_wait<2>();
  keep(p, arch::load_shared_words(chunk(me())));  // BUG waits_for_another_group
  arch::copy_async_wait<0>();
}

SHRANK_MICRO(copy_seen_without_a_barrier) {
  start(p, me());
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  keep(p, arch::load_shared_words(chunk(neighbour())));  // BUG copy_seen_without_a_barrier
}

SHRANK_MICRO(copied_over_too_soon) {
  put(chunk(me()), mine(p));
  arch::sync_threads();
  keep(p, arch::load_shared_words(chunk(neighbour())));
  arch::copy_async(chunk(me()), p.input, 0);  // BUG copied_over_too_soon
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
}

SHRANK_MICRO(never_awaited) {
  start(p, me());  // BUG never_awaited
  arch::copy_async_commit();
  keep(p, mine(p));
}

SHRANK_MICRO(never_committed) {
  start(p, me());  // BUG never_committed
  arch::copy_async_wait<0>();
  keep(p, mine(p));
}

SHRANK_MICRO(written_while_copied) {
  start(p, me());
  arch::store_shared(chunk(me()), 0u);  // BUG written_while_copied
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  keep(p, mine(p));
}

SHRANK_MICRO(copy_of_nothing_is_zero) {
  arch::copy_async(chunk(me()), p.input, 0);
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  keep(p, arch::load_shared_words(chunk(me())));
}

// ---- bounds

SHRANK_MICRO(uninitialised) {
  keep(p, arch::load_shared_words(chunk(me())));  // BUG uninitialised
}

SHRANK_MICRO(past_shared) {
  arch::store_shared(arch::dynamic_shared() + kSharedBytes + me() * 4, 0u);  // BUG past_shared
}

SHRANK_MICRO(before_shared) {
  arch::store_shared(arch::dynamic_shared() - 4 - me() * 4, 0u);  // BUG before_shared
}

SHRANK_MICRO(misaligned_shared) {
  keep(p, arch::load_shared_words(chunk(me()) + 4));  // BUG misaligned_shared
}

SHRANK_MICRO(past_the_input) {
  keep(p, arch::load<uint32_t, 4>(p.input + 1024));  // BUG past_the_input
}

SHRANK_MICRO(one_past_the_output) {
  p.output[1024] = 0;  // BUG one_past_the_output
}

SHRANK_MICRO(copy_past_the_input) {
  arch::copy_async(chunk(me()), p.input + 1024, 16);  // BUG copy_past_the_input
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
}

SHRANK_MICRO(misaligned_global) {
  keep(p, arch::load<uint32_t, 4>(p.input + me() + 1));  // BUG misaligned_global
}

SHRANK_MICRO(writes_the_input) {
  const_cast<uint32_t*>(p.input)[me()] = 0;  // BUG writes_the_input
}

SHRANK_MICRO(reads_the_output) {
  keep(p, arch::load<uint32_t, 4>(p.output + me() * 4));  // BUG reads_the_output
}

SHRANK_MICRO(one_place_two_threads) {
  arch::store(p.output + me() / 2 * 4, mine(p));  // BUG one_place_two_threads
}

SHRANK_MICRO(register_array_overrun) {
  uint32_t registers[4] = {1, 2, 3, 4};
  p.output[me()] = registers[4 + me() * 0];  // BUG register_array_overrun
}

SHRANK_MICRO(register_array_overrun_far) {
  uint32_t registers[4] = {};
  for (int i = 0; i < 200000; i++) registers[i] = 1;  // BUG register_array_overrun_far
  p.output[me()] = registers[0];
}

SHRANK_MICRO(divides_by_zero) {
  p.output[me()] = static_cast<uint32_t>(5 / (me() - me()));  // BUG divides_by_zero
}

SHRANK_MICRO(writes_the_host) {
  [[maybe_unused]] static uint32_t of_the_host;
  of_the_host = 1;  // BUG writes_the_host
}

// The other lane's read is not forgotten for the later one of the lane that writes.
SHRANK_MICRO(read_by_two_lanes) {
  if (me() < 4) arch::store_shared(arch::dynamic_shared() + me() * 4, 0u);
  arch::sync_threads();
  if (me() >= 2) return;
  arch::load_shared_words(chunk(0));
  if (me() == 1) arch::store_shared(chunk(0), 1u);  // BUG read_by_two_lanes
}

SHRANK_MICRO(one_lane_past_shared) {
  uint32_t fragment[4];
  put(chunk(me()), mine(p));
  arch::sync_threads();
  arch::load_matrices(fragment, chunk(me() == 37 ? kSharedBytes / 16 : me()));  // BUG one_lane_past_shared
}

struct Odd { uint32_t word[3]; };

SHRANK_MICRO(copies_an_odd_struct) {
  reinterpret_cast<Odd*>(p.output)[me()] = reinterpret_cast<const Odd*>(p.input)[me()];
}

struct half_a_warp : Micro {
  static constexpr int kThreads = 48;
  static void run(const Params& p) {
    float sum[4] = {};
    const uint32_t a[4] = {};
    arch::multiply_add<arch::bfloat16>(sum, a, 0, 0);  // BUG half_a_warp
    p.output[me()] = static_cast<uint32_t>(sum[0]);
  }
};

struct two_blocks_one_place : Micro {
  static constexpr int kBlocks = 2;
  static void run(const Params& p) {
    arch::grid_dependency_wait();
    keep(p, mine(p));  // BUG two_blocks_one_place
  }
};

struct before_the_grid_before : Micro {
  static void run(const Params& p) {
    const Words words = mine(p);  // BUG before_the_grid_before
    arch::grid_dependency_wait();
    keep(p, words);
  }
};

struct never_waits_for_the_grid_before : Micro {
  static void run(const Params& p) { keep(p, mine(p)); }  // BUG never_waits_for_the_grid_before
};

struct too_much_shared : Micro {
  static constexpr int kSharedBytes = 228 * 1024;
  static void run(const Params&) {}
};

struct too_many_threads : Micro {
  static constexpr int kThreads = 1056;
  static void run(const Params&) {}
};

}  // namespace shrank::micro
