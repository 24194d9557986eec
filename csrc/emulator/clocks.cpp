// Happens-before: clocks[t][u] is what thread t knows of thread u's time.
#include <algorithm>

#include "machine.h"

namespace shrank::emulator {
namespace {

std::vector<uint32_t> clocks;
int width;

uint32_t* row(int thread) { return &clocks[static_cast<std::size_t>(thread) * width]; }

}  // namespace

void reset_clocks(int threads) {
  width = threads;
  clocks.assign(static_cast<std::size_t>(width) * width, 0);
  for (int i = 0; i < width; ++i) row(i)[i] = 1;
}

uint32_t clock_of(int thread) { return row(thread)[thread]; }

bool happened_before(int thread, uint32_t clock, int observer) { return clock <= row(observer)[thread]; }

void meet(const std::vector<int>& threads) {
  static std::vector<uint32_t> known;
  known.assign(width, 0);
  bool awaited = false;
  for (int thread : threads) {
    const uint32_t* of = row(thread);
    for (int i = 0; i < width; ++i) known[i] = std::max(known[i], of[i]);
    awaited = awaited || world.threads[thread].awaited;
  }
  for (int thread : threads) {
    std::copy(known.begin(), known.end(), row(thread));
    ++row(thread)[thread];
    world.threads[thread].awaited = awaited;
  }
}

}  // namespace shrank::emulator
