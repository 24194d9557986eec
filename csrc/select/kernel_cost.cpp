#include "kernel_cost.h"

#include <algorithm>

#include "cost.h"
#include "integers.h"

namespace shrank {
namespace {

// An SM has four schedulers, each of which issues an instruction a clock, of whichever of its warps can go on. One warp
// alone waits for its own results, 4 to 6 clocks for most instructions, and has about two others ready by then: assumed
// half a slot a clock.
constexpr double kSchedulers = 4, kSlotsOfOneWarp = 0.5;

// L1 and shared memory move 128 bytes a clock (CUDA C++ Programming Guide).
constexpr double kL1BytesPerClock = 128;

// What the blocks of one SM need, in seconds, of each resource; `warps` are those that can issue.
struct Seconds {
  double issue, tensor, l1, l2, dram;

  double longest() const { return std::max({issue, tensor, l1, l2, dram}); }
  Seconds operator+(const Seconds& o) const {
    return {issue + o.issue, tensor + o.tensor, l1 + o.l1, l2 + o.l2, dram + o.dram};
  }
};

Seconds seconds(const Phase& phase, double warps, const Device& d) {
  const double slots = std::min(kSchedulers, warps * kSlotsOfOneWarp) * clock_hz(d);
  return {phase.slots / slots, 2 * phase.products / (d.flops_half * mma_share(d.arch) / d.sms),
          phase.l1_bytes / (kL1BytesPerClock * clock_hz(d)), phase.l2_bytes / kL2OfOneSm,
          phase.dram_bytes / (kDrawOfOneSm * d.bandwidth / d.sms)};
}

}  // namespace

int resident_blocks(int threads, int shared_bytes, const Device& d) {
  constexpr int kReserved = 1024;  // of each block's shared memory, for the system
  const int by_shared = (d.smem_per_block + kReserved) / (shared_bytes + kReserved);
  const int by_registers = 256 / threads;
  return std::max(1, std::min(by_shared, by_registers));
}

double kernel_us(const Launch& launch, std::initializer_list<Phase> phases, const Device& d) {
  const double most = real(ceil_div(launch.blocks, d.sms));  // on one SM
  const double held = std::min<double>(most, resident_blocks(launch.threads, launch.shared_bytes, d));
  const double warps = launch.threads / 32.0;
  Seconds together{};
  double alone = 0, l2_bytes = 0;
  for (const Phase& phase : phases) {
    together = together + seconds(phase, warps * held, d);
    alone += std::max(seconds(phase, warps, d).longest(), phase.wait_us * 1e-6);
    l2_bytes += phase.l2_bytes;
  }
  const double rounds = real(ceil_div(static_cast<int64_t>(most), static_cast<int64_t>(held)));
  const double l2 = real(launch.blocks) * l2_bytes / (d.sms * kL2PerSm);
  return std::max({rounds * alone, most * together.longest(), l2, launch.dram_bytes / d.bandwidth}) * 1e6 + d.node_us;
}

double mma_share(int arch) {
  if (arch >= 100 && arch < 120) return 0.2;
  if (arch >= 90 && arch < 100) return 0.6;
  return 0.85;
}

}  // namespace shrank
