// The emulator's state: one block of threads at a time, each a fiber. Not thread-safe; one launch at a time.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "instructions.h"
#include "launch.h"

namespace shrank::emulator {

using Site = const void*;  // the return address into the kernel: which instruction of it
#define SHRANK_SITE __builtin_return_address(0)

inline constexpr int kWarp = 32, kMaxThreads = 1024;
inline constexpr std::size_t kMaxShared = 227 * 1024;  // the opt-in maximum of sm_90
inline constexpr uint32_t kSharedBase = 0x400;  // a kernel that takes address 0 for shared memory must not pass
inline constexpr int kGranule = 2;  // bytes of shared memory with one history

struct Copy {
  uint32_t to;
  std::array<unsigned char, 16> data;
  Site site;
};

struct Thread {
  Index3 index;
  int number, lane, warp;
  void* stack_pointer;
  unsigned char *stack_low, *stack_high;
  bool done;
  Site site;  // where it waits
  const char* doing;  // and in which instruction
  bool awaited;  // it, or one it has met at a barrier since, has called grid_dependency_wait
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::unordered_map<Site, uint32_t> executions;  // of each access to shared memory
};

struct World {
  const Launch* launch = nullptr;
  const std::vector<Buffer>* buffers = nullptr;
  Options options;
  Index3 block;
  std::vector<Thread> threads;
  Thread* running = nullptr;
  const Thread* blamed = nullptr;  // whom reports name in place of the running thread, which acts for its warp
  void* main_stack_pointer = nullptr;
  std::vector<uint32_t> ready;  // lanes of each warp that can go on
  int alive = 0;
  bool aborted = false;
  uint64_t random = 0;
  Counts counts;

  int warps() const { return static_cast<int>(ready.size()); }
};
extern World world;

uint32_t random_number();

// ---- fibers (fiber.cpp)
void prepare_fibers(int threads, void (*body)());
void switch_to(Thread& thread);
[[noreturn]] void leave();
void block_here(Site site, const char* doing);  // until wake()
void yield_here(Site site, const char* doing);  // others may go first
void wake(int thread);

// ---- reports (report.cpp)
void problem(const std::string& kind, const char* doing, Site site, const std::string& detail, Site other = nullptr,
             const char* other_did = "");
[[noreturn]] void fatal(const std::string& kind, const char* doing, Site site, const std::string& detail);
void clear_problems();
std::vector<std::string> take_problems();

// ---- order of events (clocks.cpp): a vector clock for each thread
void reset_clocks(int threads);
uint32_t clock_of(int thread);
bool happened_before(int thread, uint32_t clock, int observer);  // the event at `clock` of `thread`
void meet(const std::vector<int>& threads);  // each has seen what all have done

// ---- shared memory (shared.cpp)
void reset_shared(std::size_t bytes);
unsigned char* shared_at(uint32_t address);
void check_shared(uint32_t address, int bytes, const char* doing, Site site);  // within bounds, aligned
void read_shared(int thread, uint32_t address, int bytes, const char* doing, Site site);
void write_shared(int thread, uint32_t address, int bytes, const char* doing, Site site);
void begin_copy(int thread, uint32_t address, int bytes, const char* doing, Site site);  // in flight from now on
void end_copy(int thread, uint32_t address, int bytes, Site site);
// One warp access: passes over the banks beyond the first of each phase.
void count_conflicts(const uint32_t* addresses, uint32_t lanes, int bytes);
// An access that the lanes make one by one: counted when all lanes of the warp have made it as often.
void count_lane_access(uint32_t address, int bytes, Site site);
void finish_counting();

// ---- global memory (global.cpp)
void reset_global();
void access_global(const void* address, int bytes, bool write, const char* doing, Site site);

// ---- warps and barriers (warp.cpp)
void reset_meetings();
// Each lane leaves its arguments; the last to come runs `execute` for all.
void rendezvous(const char* doing, uint32_t lanes, void* arguments, Site site, void (*execute)(void** arguments));

}  // namespace shrank::emulator
