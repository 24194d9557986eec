// Runs a kernel on a CPU and reports everything it did wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "instructions.h"

namespace shrank::emulator {

// Global memory that the kernel may touch, to the byte.
struct Buffer {
  std::string name;
  const void* base;
  std::size_t bytes;
  bool writable = false;
  bool awaited = true;  // earlier grids may write it: no access before grid_dependency_wait
};

struct Options {
  uint64_t seed = 0;          // order of blocks, warps and lanes
  // Asynchronous copies land at once: shows buffers reused too soon. Otherwise only when they are awaited: shows reads
  // that come too soon.
  bool copies_early = false;
};

struct Counts {
  uint64_t multiply_adds = 0;  // warp instructions
  uint64_t load_matrices = 0;  // warp instructions
  uint64_t bank_conflicts = 0;  // extra passes over the banks, of all warp accesses to shared memory
  uint64_t barriers = 0;
};

struct Result {
  std::vector<std::string> problems;  // empty: none; each names kind, kernel, instruction, file:line (both sides)
  Counts counts;
};

struct Launch {
  std::string kernel;  // its name, for the reports
  Index3 grid, block;
  std::size_t shared_bytes;
  void (*entry)(const void* params);
  const void* params;
  std::size_t params_bytes;
  // The next grid reads, before it waits, what the grids before this one have written: this one must have waited before
  // it lets the next one start.
  bool relied_on = false;
};

Result run(const Launch& launch, const std::vector<Buffer>& buffers, const Options& options);

// A kernel is a struct with Params, kThreads, kSharedBytes and run(const Params&), as kernels/launch.cuh has it.
template <typename Kernel>
Result launch(const std::string& name, Index3 grid, const typename Kernel::Params& params,
              const std::vector<Buffer>& buffers, const Options& options, bool relied_on = false,
              std::size_t shared_bytes = Kernel::kSharedBytes) {
  const auto entry = [](const void* at) { Kernel::run(*static_cast<const typename Kernel::Params*>(at)); };
  return run({name, grid, {Kernel::kThreads}, shared_bytes, entry, &params, sizeof params, relied_on}, buffers,
             options);
}

}  // namespace shrank::emulator
