// What threads do together: barriers, and the instructions of a warp.
#include <cstring>

#include "half.h"
#include "machine.h"

namespace shrank::emulator {
namespace {

struct Meeting {
  uint32_t arrived = 0, lanes = 0;
  const char* doing = nullptr;
  Site site = nullptr;
  std::array<void*, kWarp> arguments{};
};

std::array<Meeting, kMaxThreads / kWarp> meetings;

struct Barrier {
  std::vector<int> arrived;
  Site site = nullptr;
};

Barrier block_barrier;

int first_of_warp() { return world.running->warp * kWarp; }

uint32_t lanes_of_warp() {
  const int count = static_cast<int>(world.threads.size()) - first_of_warp();
  return count < kWarp ? (1u << count) - 1 : 0xffffffffu;
}

}  // namespace

void reset_meetings() {
  meetings.fill({});
  block_barrier = {};
}

void rendezvous(const char* doing, uint32_t lanes, void* arguments, Site site, void (*execute)(void** arguments)) {
  const Thread& thread = *world.running;
  Meeting& meeting = meetings[thread.warp];
  if (lanes & ~lanes_of_warp()) {
    fatal("warp instruction in a part of a warp", doing, site, "the block's last warp has fewer lanes");
  }
  if (!meeting.arrived) {
    meeting.doing = doing;
    meeting.site = site;
    meeting.lanes = lanes;
  } else if (meeting.site != site || meeting.lanes != lanes) {
    problem("divergent warp instruction", doing, site, "the lanes of a warp are at different instructions",
            meeting.site, "others");
    fatal("divergent warp instruction", doing, site, std::string("others are in ") + meeting.doing);
  }
  meeting.arrived |= 1u << thread.lane;
  meeting.arguments[thread.lane] = arguments;
  if (meeting.arrived != lanes) return block_here(site, doing);
  meeting.arrived = 0;
  execute(meeting.arguments.data());
  for (int lane = 0; lane < kWarp; ++lane)
    if ((lanes >> lane & 1) && lane != thread.lane) wake(first_of_warp() + lane);
}

void sync_threads() {
  const Site site = SHRANK_SITE;
  Barrier& barrier = block_barrier;
  ++world.counts.barriers;
  if (barrier.arrived.empty()) barrier.site = site;
  else if (barrier.site != site) {
    problem("divergent barrier", "sync_threads", site, "threads of a block are at different barriers", barrier.site,
            "others");
  }
  barrier.arrived.push_back(world.running->number);
  if (barrier.arrived.size() < world.threads.size()) return block_here(site, "sync_threads");
  meet(barrier.arrived);
  for (int thread : barrier.arrived)
    if (thread != world.running->number) wake(thread);
  barrier.arrived.clear();
  yield_here(site, "sync_threads");
}

void sync_warp(uint32_t lanes) {
  static uint32_t met;
  met = lanes & lanes_of_warp();
  rendezvous("sync_warp", met, nullptr, SHRANK_SITE, [](void**) {
    std::vector<int> threads;
    for (int lane = 0; lane < kWarp; ++lane)
      if (met >> lane & 1) threads.push_back(first_of_warp() + lane);
    meet(threads);
  });
}

float exchange(float number, int lanes) {
  struct Arguments {
    float number, found;
    int lanes;
  } mine{number, 0, lanes};
  rendezvous("exchange", 0xffffffffu, &mine, SHRANK_SITE, [](void** all) {
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& own = *static_cast<Arguments*>(all[lane]);
      own.found = static_cast<const Arguments*>(all[lane ^ own.lanes])->number;
    }
  });
  return mine.found;
}

// ---- matrices: fragment layouts as in arch/matrix.cuh

void load_matrices(uint32_t (&fragment)[4], uint32_t row, bool transposed) {
  struct Arguments {
    uint32_t* fragment;
    uint32_t row;
    bool transposed;
    Site site;
  } mine{fragment, row, transposed, SHRANK_SITE};
  check_shared(row, 16, "load_matrices", mine.site);  // by the lane whose address it is
  rendezvous("load_matrices", 0xffffffffu, &mine, mine.site, [](void** lanes) {
    uint16_t rows[kWarp][8];
    uint32_t addresses[kWarp];
    ++world.counts.load_matrices;
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& own = *static_cast<Arguments*>(lanes[lane]);
      addresses[lane] = own.row;
      world.blamed = &world.threads[first_of_warp() + lane];
      read_shared(first_of_warp() + lane, own.row, 16, "load_matrices", own.site);
      std::memcpy(rows[lane], shared_at(own.row), 16);
    }
    world.blamed = nullptr;
    count_conflicts(addresses, 0xffffffffu, 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& own = *static_cast<Arguments*>(lanes[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int i = 0; i < 2; ++i) {
          const int across = lane / 4, along = lane % 4 * 2 + i;
          const uint16_t number = own.transposed ? rows[matrix * 8 + along][across] : rows[matrix * 8 + across][along];
          pair |= static_cast<uint32_t>(number) << 16 * i;
        }
        own.fragment[matrix] = pair;
      }
    }
  });
}

namespace {

template <Half half> float widen(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  if constexpr (half == Half::bfloat16) return widen_bfloat16(bits);
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = widen_float16(static_cast<uint16_t>(i));
    return all;
  }();
  return table[bits];
}

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// Sums in fp32, in the order of k: a tensor core keeps more bits inside, in an order of its own.
template <Half half> void execute_multiply_add(void** lanes) {
  float a[16][16], b[16][8], sum[16][8];
  ++world.counts.multiply_adds;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<Product*>(lanes[lane]);
    const int group = lane / 4, at = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part) a[group + part % 2 * 8][at + part / 2 * 8 + i] = widen<half>(own.a[part], i);
      for (int part = 0; part < 2; ++part) b[at + part * 8 + i][group] = widen<half>(own.b[part], i);
    }
    for (int i = 0; i < 4; ++i) sum[group + i / 2 * 8][at + i % 2] = own.sum[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Product*>(lanes[lane])->sum[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace

void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half half) {
  Product mine{sum, a, {b0, b1}};
  rendezvous("multiply_add", 0xffffffffu, &mine, SHRANK_SITE,
             half == Half::bfloat16 ? execute_multiply_add<Half::bfloat16> : execute_multiply_add<Half::float16>);
}

}  // namespace shrank::emulator
