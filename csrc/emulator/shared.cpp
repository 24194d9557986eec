// Shared memory: its bytes, and for every two of them who wrote and read them when.
#include <algorithm>
#include <cstring>
#include <map>

#include "machine.h"

namespace shrank::emulator {
namespace {

enum class Content : uint8_t { uninitialised, in_flight, present };

struct Cell {
  uint32_t written = 0;  // clock of the writer
  int16_t writer = 0;
  Content content = Content::uninitialised;
  Site write_site = nullptr, read_site = nullptr;
};

// The lanes of a warp that read at the newest of their times; between two barriers all lanes have one time.
struct Readers { uint32_t clock = 0, lanes = 0; };

alignas(1024) unsigned char memory[kMaxShared];
std::size_t total_bytes;
std::vector<Cell> cells;
std::vector<Readers> readers;  // of each cell, by warp

template <typename Visit> void for_cells(uint32_t address, int bytes, const Visit& visit) {
  const std::size_t first = (address - kSharedBase) / kGranule, last = (address - kSharedBase + bytes - 1) / kGranule;
  for (std::size_t i = first; i <= last; ++i) visit(cells[i], &readers[i * world.warps()], i * kGranule);
}

std::string place(std::size_t offset) { return "shared offset " + std::to_string(offset); }

std::string by(int thread) { return "by thread " + std::to_string(thread); }

void check_overwrite(int thread, Cell& cell, Readers* of, std::size_t offset, const char* doing, Site site) {
  if (cell.content == Content::in_flight) {
    problem("write over a copy in flight", doing, site, place(offset), cell.write_site,
            ("copied " + by(cell.writer)).c_str());
  } else if (cell.content == Content::present && !happened_before(cell.writer, cell.written, thread)) {
    problem("race: write after unordered write", doing, site, place(offset), cell.write_site,
            ("written " + by(cell.writer)).c_str());
  }
  for (int warp = 0; warp < world.warps(); ++warp) {
    for (uint32_t lanes = of[warp].lanes; lanes; lanes &= lanes - 1) {
      const int reader = warp * kWarp + __builtin_ctz(lanes);
      if (reader == thread || happened_before(reader, of[warp].clock, thread)) continue;
      problem("race: write after unordered read", doing, site, place(offset), cell.read_site,
              ("read " + by(reader)).c_str());
    }
    of[warp] = {};
  }
}

void mark(int thread, Cell& cell, Content content, Site site) {
  cell.written = clock_of(thread);
  cell.writer = static_cast<int16_t>(thread);
  cell.content = content;
  cell.write_site = site;
}

}  // namespace

void reset_shared(std::size_t bytes) {
  total_bytes = bytes;
  std::memset(memory, 0xff, total_bytes);
  cells.assign((total_bytes + kGranule - 1) / kGranule, {});
  readers.assign(cells.size() * world.warps(), {});
}

uint32_t dynamic_shared() { return kSharedBase; }

unsigned char* shared_at(uint32_t address) { return memory + (address - kSharedBase); }

void check_shared(uint32_t address, int bytes, const char* doing, Site site) {
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + bytes > static_cast<int64_t>(total_bytes)) {
    fatal("shared memory out of bounds", doing, site,
          "offset " + std::to_string(offset) + " of " + std::to_string(total_bytes));
  }
  if (address % bytes) fatal("misaligned shared access", doing, site, "offset " + std::to_string(offset));
}

void read_shared(int thread, uint32_t address, int bytes, const char* doing, Site site) {
  check_shared(address, bytes, doing, site);
  for_cells(address, bytes, [&](Cell& cell, Readers* of, std::size_t offset) {
    if (cell.content == Content::in_flight) {
      problem("read of a copy in flight", doing, site, place(offset), cell.write_site,
              ("copied " + by(cell.writer)).c_str());
    } else if (cell.content == Content::uninitialised) {
      problem("read of uninitialised shared memory", doing, site, place(offset));
    } else if (!happened_before(cell.writer, cell.written, thread)) {
      problem("race: read after unordered write", doing, site, place(offset), cell.write_site,
              ("written " + by(cell.writer)).c_str());
    }
    Readers& known = of[thread / kWarp];
    if (known.clock != clock_of(thread)) known = {clock_of(thread), 0};
    known.lanes |= 1u << thread % kWarp;
    cell.read_site = site;
  });
}

void write_shared(int thread, uint32_t address, int bytes, const char* doing, Site site) {
  check_shared(address, bytes, doing, site);
  for_cells(address, bytes, [&](Cell& cell, Readers* of, std::size_t offset) {
    check_overwrite(thread, cell, of, offset, doing, site);
    mark(thread, cell, Content::present, site);
  });
}

void begin_copy(int thread, uint32_t address, int bytes, const char* doing, Site site) {
  check_shared(address, bytes, doing, site);
  for_cells(address, bytes, [&](Cell& cell, Readers* of, std::size_t offset) {
    check_overwrite(thread, cell, of, offset, doing, site);
    mark(thread, cell, Content::in_flight, site);
  });
}

void end_copy(int thread, uint32_t address, int bytes, Site site) {
  for_cells(address, bytes, [&](Cell& cell, Readers*, std::size_t) { mark(thread, cell, Content::present, site); });
}

// ---- banks: 32 of 4 bytes; 128 bytes a pass, so that wider accesses take the lanes in phases

void count_conflicts(const uint32_t* addresses, uint32_t lanes, int bytes) {
  const int words = std::max(bytes / 4, 1), in_phase = kWarp / words;
  for (int first = 0; first < kWarp; first += in_phase) {
    std::array<std::vector<uint32_t>, 32> banks;
    std::size_t passes = 1;
    for (int lane = first; lane < first + in_phase; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int i = 0; i < words; ++i) {
        const uint32_t word = addresses[lane] / 4 + i;
        auto& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        passes = std::max(passes, bank.size());
      }
    }
    world.counts.bank_conflicts += passes - 1;
  }
}

namespace {

struct Access {
  std::array<uint32_t, kWarp> addresses{};
  uint32_t lanes = 0;
  int bytes = 0;
};

std::map<std::pair<int, Site>, std::map<uint32_t, Access>> accesses;  // by warp and instruction, then by occurrence

}  // namespace

void count_lane_access(uint32_t address, int bytes, Site site) {
  Thread& thread = *world.running;
  const uint32_t occurrence = thread.executions[site]++;
  auto& of_site = accesses[{thread.warp, site}];
  Access& access = of_site[occurrence];
  access.addresses[thread.lane] = address;
  access.lanes |= 1u << thread.lane;
  access.bytes = bytes;
  if (access.lanes != 0xffffffffu) return;
  count_conflicts(access.addresses.data(), access.lanes, access.bytes);
  of_site.erase(occurrence);
}

void finish_counting() {
  for (const auto& [site, of_site] : accesses)
    for (const auto& [occurrence, access] : of_site)
      count_conflicts(access.addresses.data(), access.lanes, access.bytes);
  accesses.clear();
}

}  // namespace shrank::emulator
