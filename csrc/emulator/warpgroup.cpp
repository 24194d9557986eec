// Products of four warps (PTX ISA, "wgmma"): issued now, done at some time before the wait. Late, they are done in the
// wait, and the sums hold NaN until then; early, at once. For the checks their operands are read at both ends.
#include <algorithm>
#include <cstring>
#include <map>

#include "half.h"
#include "hopper.h"
#include "machine.h"

namespace shrank::emulator {
namespace {

constexpr const char* kDoing = "warpgroup_multiply_add";
constexpr int kDepth = 16, kRows = 16;  // of a product; of a warp's part of the sums

struct Product {
  std::array<float*, kWarp> sums;  // of the lanes
  int columns;
  uint64_t a, b;
  Half half;
  Site site;
};

struct Warp {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::size_t issued = 0;
  std::map<float*, std::vector<float>> hidden;  // the true values of sums that hold NaN
};

std::array<Warp, kMaxThreads / kWarp> warps;
std::map<int, std::vector<std::pair<uint64_t, uint64_t>>> of_groups;  // operands of each warpgroup's products
std::vector<uint32_t> proxy_fences;                                   // of each thread: its clock at the last one

Warp& warp() { return warps[world.running->warp]; }

// Bits of a descriptor: 0-13 start / 16, 32-45 bytes between groups of 8 rows / 16, 49-51 base offset, 62-63 swizzle.
struct Operand {
  uint32_t start, group_bytes;

  Operand(uint64_t bits, Site site) : start((bits & 0x3fff) << 4), group_bytes((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fatal("operand refused", kDoing, site, "not of the 128-byte swizzle");
    if (bits >> 49 & 7) fatal("operand refused", kDoing, site, "a base offset");
  }

  uint32_t at(int row, int column) const {
    const uint32_t address = start + row / 8 * group_bytes + row % 8 * 128 + column * 2;
    return address ^ (address >> 7 & 7) << 4;
  }
};

void check_read(const Operand& operand, int first_row, int rows, Site site) {
  const int reader = world.running->warp * kWarp;
  for (int row = first_row; row < first_row + rows; ++row) {
    for (int column = 0; column < kDepth; column += 8) {
      const uint32_t address = operand.at(row, column);
      read_shared(reader, address, 16, kDoing, site);
      const Writer writer = last_writer(address);
      if (writer.thread < static_cast<int>(world.threads.size()) && writer.clock > proxy_fences[writer.thread]) {
        problem("stored operand without fence_async_proxy", kDoing, site, "", writer.site, "stored");
      }
    }
  }
}

int first_row() { return world.running->warp % 4 * kRows; }

void check_operands(const Product& product) {
  check_read({product.a, product.site}, first_row(), kRows, product.site);
  check_read({product.b, product.site}, 0, product.columns, product.site);
}

std::vector<float> read(const Operand& operand, int first, int rows, Half half) {
  std::vector<float> numbers;
  for (int row = first; row < first + rows; ++row) {
    for (int column = 0; column < kDepth; ++column) {
      uint16_t bits;
      std::memcpy(&bits, shared_at(operand.at(row, column)), sizeof bits);
      numbers.push_back(half == Half::bfloat16 ? widen_bfloat16(bits) : widen_float16(bits));
    }
  }
  return numbers;
}

// This warp's 16 rows. The order of the sums is not the tensor core's.
void compute(const Product& product) {
  const auto a = read({product.a, product.site}, first_row(), kRows, product.half);
  const auto b = read({product.b, product.site}, 0, product.columns, product.half);
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto found = warp().hidden.find(product.sums[lane]);
    float* sums = found == warp().hidden.end() ? product.sums[lane] : found->second.data();
    for (int i = 0; i < product.columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < kDepth; ++k) sums[i] += a[row * kDepth + k] * b[column * kDepth + k];
    }
  }
}

void hide(const Product& product) {
  const int count = product.columns / 2;
  for (float* sums : product.sums) {
    if (!warp().hidden.try_emplace(sums, sums, sums + count).second) continue;
    std::fill_n(sums, count, float_of(0xffffffffu));
  }
}

bool in_flight(const float* sums) {
  const auto uses = [&](const Product& p) { return std::find(p.sums.begin(), p.sums.end(), sums) != p.sums.end(); };
  const auto any = [&](const std::vector<Product>& group) { return std::any_of(group.begin(), group.end(), uses); };
  return any(warp().open) || std::any_of(warp().groups.begin(), warp().groups.end(), any);
}

void show_finished() {
  auto& hidden = warp().hidden;
  for (auto sums = hidden.begin(); sums != hidden.end();) {
    if (in_flight(sums->first)) {
      ++sums;
      continue;
    }
    std::copy(sums->second.begin(), sums->second.end(), sums->first);
    sums = hidden.erase(sums);
  }
}

// The warps of a group must issue the same products in the same order.
void check_group(const Product& product) {
  auto& issued = of_groups[world.running->warp / 4];
  const std::size_t number = warp().issued++;
  if (number == issued.size()) issued.emplace_back(product.a, product.b);
  else if (issued[number] != std::pair{product.a, product.b}) {
    problem("divergent warpgroup instruction", kDoing, product.site, "the warps have different operands");
  }
}

void issue(void** lanes) {
  Product product = *static_cast<Product*>(lanes[0]);
  if (!warp().fenced) problem("product without warpgroup_fence", kDoing, product.site, "");
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<Product*>(lanes[lane]);
    if (own.a != product.a || own.b != product.b) {
      problem("divergent warp instruction", kDoing, product.site, "the lanes have different operands");
    }
    product.sums[lane] = own.sums[0];
  }
  check_group(product);
  check_operands(product);
  if (world.options.copies_early) compute(product);
  else hide(product);
  warp().open.push_back(product);
}

void retire(void** pending) {
  auto& groups = warp().groups;
  while (static_cast<int>(groups.size()) > *static_cast<int*>(pending[0])) {
    for (const Product& product : groups.front()) {
      check_operands(product);
      if (!world.options.copies_early) compute(product);
    }
    groups.pop_front();
  }
  show_finished();
}

void reset() {
  warps.fill({});
  of_groups.clear();
  proxy_fences.assign(world.threads.size(), 0);
}

void finish() {
  for (int i = 0; i < world.warps(); ++i) {
    const std::string by = "by warp " + std::to_string(i);
    for (const auto& group : warps[i].groups)
      for (const Product& product : group) problem("product never awaited", kDoing, product.site, by);
    for (const Product& product : warps[i].open) problem("product never committed", kDoing, product.site, by);
    const auto group = of_groups.find(i / 4);
    if (group != of_groups.end() && group->second.size() != warps[i].issued) {
      problem("divergent warpgroup instruction", kDoing, nullptr,
              "warp " + std::to_string(i) + " issued " + std::to_string(warps[i].issued) + " products, others more");
    }
  }
}

[[maybe_unused]] const bool kRegistered = add_engine({reset, [] { return false; }, finish});

}  // namespace

void fence_async_proxy() {
  static Knowledge nobody;
  const int thread = world.running->number;
  proxy_fences[thread] = clock_of(thread);
  release(thread, nobody);  // what it stores from now on is later
}

void warpgroup_fence() {
  rendezvous("warpgroup_fence", 0xffffffffu, nullptr, SHRANK_SITE, [](void**) { warp().fenced = true; });
}

void warpgroup_commit() {
  rendezvous("warpgroup_commit", 0xffffffffu, nullptr, SHRANK_SITE, [](void**) {
    warp().groups.push_back(std::move(warp().open));
    warp().open.clear();
  });
}

void warpgroup_wait(int pending) { rendezvous("warpgroup_wait", 0xffffffffu, &pending, SHRANK_SITE, retire); }

void warpgroup_multiply_add(float* sum, int columns, uint64_t a, uint64_t b, Half half) {
  Product mine{{sum}, columns, a, b, half, SHRANK_SITE};
  rendezvous(kDoing, 0xffffffffu, &mine, mine.site, issue);
}

}  // namespace shrank::emulator
