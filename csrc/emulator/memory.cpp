// Loads, stores and copies of one thread; and the plain accesses of a kernel's source, which arrive as calls of
// -fsanitize=thread's runtime. That runtime is this file: nothing else of the sanitizer is linked.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
}

namespace shrank::emulator {

const Index3& threadIdx() { return world.running->index; }
const Index3& blockIdx() { return world.block; }
const Index3& blockDim() { return world.launch->block; }
const Index3& gridDim() { return world.launch->grid; }

void load_shared(void* to, uint32_t address, int bytes) {
  read_shared(world.running->number, address, bytes, "load_shared", SHRANK_SITE);
  count_lane_access(address, bytes, SHRANK_SITE);
  std::memcpy(to, shared_at(address), bytes);
}

void store_shared(uint32_t address, const void* from, int bytes) {
  write_shared(world.running->number, address, bytes, "store_shared", SHRANK_SITE);
  count_lane_access(address, bytes, SHRANK_SITE);
  std::memcpy(shared_at(address), from, bytes);
}

void load_global(void* to, const void* address, int bytes) {
  access_global(address, bytes, false, "load", SHRANK_SITE);
  std::memcpy(to, address, bytes);
}

void store_global(void* address, const void* from, int bytes) {
  access_global(address, bytes, true, "store", SHRANK_SITE);
  std::memcpy(address, from, bytes);
}

// ---- copies: in flight, from their issue until their thread awaits them

void copy_async(uint32_t to, const void* from, int valid) {
  const Site site = SHRANK_SITE;
  Thread& thread = *world.running;
  if (valid != 0 && valid != 16) {
    fatal("copy_async of a part", "copy_async", site, std::to_string(valid) + " of 16 bytes");
  }
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    fatal("misaligned global access", "copy_async", site, "source of 16 bytes");
  }
  Copy copy{to, {}, site};
  if (valid) {
    access_global(from, 16, false, "copy_async", site);
    std::memcpy(copy.data.data(), from, 16);
  }
  begin_copy(thread.number, to, 16, "copy_async", site);
  count_lane_access(to, 16, site);
  if (world.options.copies_early) std::memcpy(shared_at(to), copy.data.data(), 16);
  else std::memset(shared_at(to), 0xff, 16);
  thread.open_copies.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = *world.running;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void copy_async_wait(int pending) {
  Thread& thread = *world.running;
  while (static_cast<int>(thread.copy_groups.size()) > pending) {
    for (const Copy& copy : thread.copy_groups.front()) {
      if (!world.options.copies_early) std::memcpy(shared_at(copy.to), copy.data.data(), 16);
      end_copy(thread.number, copy.to, 16, copy.site);
    }
    thread.copy_groups.pop_front();
  }
}

void grid_dependency_wait() { world.running->awaited = true; }
void grid_dependency_launch() {
  if (world.launch->relied_on && !world.running->awaited)
    problem("the next grid may start too soon", "grid_dependency_launch", SHRANK_SITE, "before grid_dependency_wait");
}

namespace {

bool within(const char* at, const void* low, const void* high) {
  return at >= static_cast<const char*>(low) && at < static_cast<const char*>(high);
}

void plain_access(void* address, int bytes, bool write, Site site) {
  if (!world.running) return;
  const Thread& thread = *world.running;
  const auto* at = static_cast<const char*>(address);
  if (within(at, thread.stack_low, thread.stack_high)) return;
  const auto* params = static_cast<const char*>(world.launch->params);
  if (within(at, params, params + world.launch->params_bytes)) return;
  if (within(at, world.threads.data(), world.threads.data() + world.threads.size())) return;  // threadIdx
  if (within(at, world.launch, world.launch + 1)) return;                                     // blockDim, gridDim
  if (!write && within(at, &__ehdr_start, &_end)) return;                                     // constants, blockIdx
  access_global(address, bytes, write, write ? "store" : "load", site);
}

// A struct of any size, in the widest pieces that its address and size allow.
void plain_range(void* address, std::size_t bytes, bool write, Site site) {
  const std::size_t both = reinterpret_cast<uintptr_t>(address) | bytes | 16, piece = both & -both;
  for (std::size_t i = 0; i < bytes; i += piece)
    plain_access(static_cast<char*>(address) + i, static_cast<int>(piece), write, site);
}

void undefined(const char* what, Site site) {
  // Fatal: the access or division that follows would harm the emulator's own process.
  if (world.running) fatal("undefined behaviour", what, site, "");
  std::fprintf(stderr, "undefined behaviour outside a kernel: %s\n", what);
  std::abort();
}

}  // namespace
}  // namespace shrank::emulator

using shrank::emulator::plain_access;
using shrank::emulator::plain_range;
using shrank::emulator::undefined;

extern "C" {
#define SHRANK_ACCESS(bytes)                                                                                           \
  void __tsan_read##bytes(void* address) { plain_access(address, bytes, false, SHRANK_SITE); }                         \
  void __tsan_write##bytes(void* address) { plain_access(address, bytes, true, SHRANK_SITE); }                         \
  void __tsan_unaligned_read##bytes(void* address) { plain_access(address, bytes, false, SHRANK_SITE); }               \
  void __tsan_unaligned_write##bytes(void* address) { plain_access(address, bytes, true, SHRANK_SITE); }
SHRANK_ACCESS(1)
SHRANK_ACCESS(2)
SHRANK_ACCESS(4)
SHRANK_ACCESS(8)
SHRANK_ACCESS(16)
#undef SHRANK_ACCESS
void __tsan_read_range(void* address, std::size_t bytes) { plain_range(address, bytes, false, SHRANK_SITE); }
void __tsan_write_range(void* address, std::size_t bytes) { plain_range(address, bytes, true, SHRANK_SITE); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

#define SHRANK_UNDEFINED(name, ...)                                                                                    \
  void __ubsan_handle_##name(__VA_ARGS__) { undefined(#name, SHRANK_SITE); }
SHRANK_UNDEFINED(out_of_bounds, void*, void*)
SHRANK_UNDEFINED(shift_out_of_bounds, void*, void*, void*)
SHRANK_UNDEFINED(add_overflow, void*, void*, void*)
SHRANK_UNDEFINED(sub_overflow, void*, void*, void*)
SHRANK_UNDEFINED(mul_overflow, void*, void*, void*)
SHRANK_UNDEFINED(negate_overflow, void*, void*)
SHRANK_UNDEFINED(divrem_overflow, void*, void*, void*)
#undef SHRANK_UNDEFINED
}
