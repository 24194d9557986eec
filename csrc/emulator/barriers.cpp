// Barriers in shared memory, and the copies that signal them (PTX ISA, "mbarrier", "cp.async.bulk.tensor").
#include <algorithm>
#include <cstring>
#include <map>

#include "hopper.h"
#include "machine.h"

namespace shrank::emulator {
namespace {

struct Phased {
  int arrivals, missing;           // of threads: of a phase, and still to come
  int64_t bytes = 0;               // expected and not landed
  uint32_t phase = 0;
  Knowledge gathered, released;    // of those who arrive in this phase; of the phase that has ended
  int maker;
  uint32_t made;                   // the maker's clock
  int engine;                      // the copies that signal it have this clock
  bool fenced = false;
  std::vector<int> waiting;
  std::vector<Site> landed, unseen;  // copies: in this phase; in those that ended since a thread last waited
};

struct TileCopy {
  uint32_t to, barrier;
  std::vector<unsigned char> tile;  // as it lies in shared memory
  Knowledge known;                  // by the thread that issued it
  Site site;
};

std::map<uint32_t, Phased> barriers;
std::vector<TileCopy> queue;

int me() { return world.running->number; }

Phased& find(uint32_t address, const char* doing, Site site) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) {
    const auto offset = static_cast<int64_t>(address) - kSharedBase;
    fatal("barrier without init_barrier", doing, site, "shared offset " + std::to_string(offset));
  }
  Phased& barrier = found->second;
  if (!happened_before(barrier.maker, barrier.made, me())) {
    problem("race: barrier used in no order with its init_barrier", doing, site,
            "made by thread " + std::to_string(barrier.maker));
  }
  return barrier;
}

void end_phase_if_complete(Phased& barrier) {
  if (barrier.missing || barrier.bytes) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  barrier.released = barrier.gathered;
  barrier.unseen.insert(barrier.unseen.end(), barrier.landed.begin(), barrier.landed.end());
  barrier.landed.clear();
  for (int thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void arrive_with(uint32_t address, int bytes, const char* doing, Site site) {
  Phased& barrier = find(address, doing, site);
  if (!barrier.missing) {
    return problem("too many arrivals at a barrier", doing, site, std::to_string(barrier.arrivals) + " expected");
  }
  release(me(), barrier.gathered);
  barrier.bytes += bytes;
  --barrier.missing;
  end_phase_if_complete(barrier);
}

void land(const TileCopy& copy) {
  Phased& barrier = barriers.at(copy.barrier);
  const int bytes = static_cast<int>(copy.tile.size());
  std::memcpy(shared_at(copy.to), copy.tile.data(), copy.tile.size());
  acquire(barrier.engine, copy.known);
  end_copy(barrier.engine, copy.to, bytes, copy.site);
  release(barrier.engine, barrier.gathered);
  barrier.bytes -= bytes;
  barrier.landed.push_back(copy.site);
  end_phase_if_complete(barrier);
}

void check_tile(const TensorMap& map, uint32_t to, const char* doing, Site site) {
  const auto wrong = [&](bool is, const char* what) {
    if (is) fatal("tile copy refused", doing, site, what);
  };
  wrong(to % 1024, "its place in shared memory is not aligned to 1024 bytes");
  wrong(map.tile_columns != 64, "a row of the tile is not 64 numbers");
  wrong(map.tile_rows < 1 || map.tile_rows > 256, "not between 1 and 256 rows");
  wrong(reinterpret_cast<uintptr_t>(map.base) % 16 || map.row_bytes % 16, "rows are not aligned to 16 bytes");
}

// The tile's bytes, in their swizzled places; each row's part inside of the matrix is an access to global memory.
std::vector<unsigned char> fetch(const TensorMap& map, int column, int row, const char* doing, Site site) {
  std::vector<unsigned char> tile(static_cast<std::size_t>(map.tile_rows) * 128, 0);
  for (int r = 0; r < map.tile_rows; ++r) {
    for (int c = 0; c < map.tile_columns; ++c) {
      const int64_t m = int64_t{row} + r, n = int64_t{column} + c;
      if (m < 0 || n < 0 || m >= map.rows || n >= map.columns) continue;
      const auto* from = static_cast<const char*>(map.base) + m * map.row_bytes + n * 2;
      access_global(from, 2, false, doing, site);
      std::memcpy(&tile[r * 128 + ((c / 8 ^ r % 8) * 8 + c % 8) * 2], from, 2);
    }
  }
  return tile;
}

void reset() {
  barriers.clear();
  queue.clear();
}

// One copy lands, whichever.
bool step() {
  if (queue.empty()) return false;
  const auto next = queue.begin() + random_number() % queue.size();
  const TileCopy copy = std::move(*next);
  queue.erase(next);
  land(copy);
  return true;
}

void finish() {
  const auto never_awaited = [](Site site) { problem("copy never awaited", "copy_tile_async", site, ""); };
  for (const TileCopy& copy : queue) never_awaited(copy.site);
  for (const auto& [address, barrier] : barriers) {
    for (Site site : barrier.landed) never_awaited(site);
    for (Site site : barrier.unseen) never_awaited(site);
  }
}

[[maybe_unused]] const bool kRegistered = add_engine({reset, step, finish});

}  // namespace

void init_barrier(uint32_t barrier, int arrivals) {
  write_shared(me(), barrier, 8, "init_barrier", SHRANK_SITE);
  Phased made{};
  made.arrivals = made.missing = arrivals;
  made.maker = me();
  made.made = clock_of(me());
  made.engine = static_cast<int>(world.threads.size() + barriers.size() % kCopyEngines);
  barriers[barrier] = made;
}

void fence_barrier_init() {
  for (auto& [address, barrier] : barriers)
    if (barrier.maker == me()) barrier.fenced = true;
}

void arrive(uint32_t barrier) { arrive_with(barrier, 0, "arrive", SHRANK_SITE); }

void arrive_expecting(uint32_t barrier, int bytes) { arrive_with(barrier, bytes, "arrive_expecting", SHRANK_SITE); }

void await_barrier(uint32_t address, uint32_t parity) {
  const Site site = SHRANK_SITE;
  Phased& barrier = find(address, "await_barrier", site);
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(me());
    block_here(site, "await_barrier");
  }
  barrier.unseen.clear();
  acquire(me(), barrier.released);
}

void copy_tile_async(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  const Site site = SHRANK_SITE;
  constexpr const char* kDoing = "copy_tile_async";
  if (!find(barrier, kDoing, site).fenced) {
    problem("copy to a barrier whose making was not fenced", kDoing, site, "fence_barrier_init is missing");
  }
  check_tile(map, to, kDoing, site);
  TileCopy copy{to, barrier, fetch(map, column, row, kDoing, site), {}, site};
  for (std::size_t at = 0; at < copy.tile.size(); at += 128) begin_copy(me(), to + at, 128, kDoing, site);
  release(me(), copy.known);
  if (world.options.copies_early) return land(copy);
  std::memset(shared_at(to), 0xff, copy.tile.size());
  queue.push_back(std::move(copy));
}

}  // namespace shrank::emulator
