// Blocks one after the other, in an order of the seed's; within a block, the seed says who goes next.
#include "launch.h"

#include <algorithm>
#include <map>

#include "machine.h"

namespace shrank::emulator {

World world;

uint32_t random_number() {  // xorshift
  world.random ^= world.random << 13;
  world.random ^= world.random >> 7;
  world.random ^= world.random << 17;
  return static_cast<uint32_t>(world.random >> 16);
}

namespace {

enum class Policy { first, last, one_warp_ahead, any_lane };

Policy policy() {
  if (world.options.seed == 0) return Policy::first;
  if (world.options.seed == 1) return Policy::last;
  return world.options.seed % 2 ? Policy::any_lane : Policy::one_warp_ahead;
}

int current_warp;

// The thread that goes next, or -1.
int pick() {
  const int warps = world.warps();
  const auto first_ready = [&](int from, int step) {
    for (int i = 0; i < warps; ++i) {
      const int warp = ((from + i * step) % warps + warps) % warps;
      if (world.ready[warp]) return warp;
    }
    return -1;
  };
  switch (policy()) {
    case Policy::first: current_warp = first_ready(0, 1); break;
    case Policy::last: current_warp = first_ready(warps - 1, -1); break;
    case Policy::one_warp_ahead:
      if (current_warp < 0 || !world.ready[current_warp]) current_warp = first_ready(random_number() % warps, 1);
      break;
    case Policy::any_lane: current_warp = first_ready(random_number() % warps, 1); break;
  }
  if (current_warp < 0) return -1;
  const uint32_t lanes = world.ready[current_warp];
  if (policy() == Policy::first) return current_warp * kWarp + __builtin_ctz(lanes);
  if (policy() == Policy::last) return current_warp * kWarp + 31 - __builtin_clz(lanes);
  const int turn = random_number() % kWarp;
  const uint32_t turned = turn ? lanes >> turn | lanes << (kWarp - turn) : lanes;
  return current_warp * kWarp + (__builtin_ctz(turned) + turn) % kWarp;
}

void report_deadlock() {
  std::map<std::pair<Site, const char*>, std::vector<int>> waiting;
  for (const Thread& thread : world.threads)
    if (!thread.done) waiting[{thread.site, thread.doing}].push_back(thread.number);
  for (const auto& [at, threads] : waiting) {
    problem("deadlock", at.second, at.first,
            std::to_string(threads.size()) + " threads wait here, from thread " + std::to_string(threads.front()) +
                "; the others have left or wait elsewhere");
  }
}

void body() { world.launch->entry(world.launch->params); }

void start_block(Index3 block) {
  const Launch& launch = *world.launch;
  const Index3 size = launch.block;
  const auto threads = static_cast<int>(size.x * size.y * size.z);
  world.block = block;
  world.threads.assign(threads, {});
  world.ready.assign((threads + kWarp - 1) / kWarp, 0);
  world.alive = threads;
  current_warp = -1;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = world.threads[i];
    const auto n = static_cast<unsigned>(i);
    thread.index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    thread.number = i;
    thread.lane = i % kWarp;
    thread.warp = i / kWarp;
    wake(i);
  }
  prepare_fibers(threads, body);
  reset_clocks(threads);
  reset_shared(launch.shared_bytes);
  reset_meetings();
}

void run_block() {
  while (world.alive && !world.aborted) {
    const int next = pick();
    if (next < 0) {
      report_deadlock();
      world.aborted = true;
      return;
    }
    world.ready[next / kWarp] &= ~(1u << next % kWarp);
    switch_to(world.threads[next]);
  }
}

void end_block() {
  finish_counting();
  if (world.aborted) return;
  for (const Thread& thread : world.threads) {
    const auto is_pending = [](const std::vector<Copy>& group) { return !group.empty(); };
    const auto group = std::find_if(thread.copy_groups.begin(), thread.copy_groups.end(), is_pending);
    const std::vector<Copy>& left = group != thread.copy_groups.end() ? *group : thread.open_copies;
    if (left.empty()) continue;
    problem("copy never awaited", "copy_async", left.front().site, "by thread " + std::to_string(thread.number));
  }
}

std::vector<Index3> blocks_in_order() {
  const Index3 grid = world.launch->grid;
  std::vector<Index3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  if (world.options.seed > 1)
    for (std::size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_number() % i]);
  return blocks;
}

}  // namespace

Result run(const Launch& launch, const std::vector<Buffer>& buffers, const Options& options) {
  world = World{};
  world.launch = &launch;
  world.buffers = &buffers;
  world.options = options;
  world.random = options.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  clear_problems();
  const std::size_t threads = std::size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads > kMaxThreads) {
    return {{"launch refused | kernel " + launch.kernel + " | " + std::to_string(threads) + " threads, at most " +
             std::to_string(kMaxThreads)},
            {}};
  }
  if (launch.shared_bytes > kMaxShared) {
    return {{"launch refused | kernel " + launch.kernel + " | " + std::to_string(launch.shared_bytes) +
             " bytes of shared memory, at most " + std::to_string(kMaxShared)},
            {}};
  }
  reset_global();
  for (const Index3& block : blocks_in_order()) {
    start_block(block);
    run_block();
    end_block();
    if (world.aborted) break;
  }
  Result result{take_problems(), world.counts};
  world.launch = nullptr;
  return result;
}

}  // namespace shrank::emulator
