// What a kernel of ours costs on a GPU. Its blocks go through phases, each of which asks something of every resource of
// their SM: what follows one another adds up, what different blocks do at a time shares the resources.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "device.h"

namespace shrank {

// What one block asks for.
struct Phase {
  double slots = 0;  // instructions that issue, all its warps together
  double products = 0;  // multiply-adds of the tensor cores
  double l1_bytes = 0;  // through the L1 of its SM
  double l2_bytes = 0;  // from L2 to its SM
  double dram_bytes = 0;
  double wait_us = 0;  // for its copies, one behind the other, if nothing else takes longer

  constexpr Phase operator*(double times) const {
    return {slots * times, products * times, l1_bytes * times, l2_bytes * times, dram_bytes * times, wait_us * times};
  }
};

struct Launch {
  int64_t blocks;
  int threads, shared_bytes;  // of a block
  double dram_bytes;  // of all blocks: each number of each tensor counted once
};

// In a replayed CUDA graph: the slowest of
// - the SM that has most blocks, as many at a time as it holds, each as slow as if it were alone there,
// - the same SM, whose blocks together leave no gap in the resource that they need most,
// - L2 and DRAM, which all SMs share.
double kernel_us(const Launch& launch, std::initializer_list<Phase> phases, const Device& d);

// Blocks that an SM holds at a time: by their shared memory, and by their registers, of which they are compiled to use
// as many as there are for two blocks of 128 threads or one of 256 (launch.cuh).
int resident_blocks(int threads, int shared_bytes, const Device& d);

// What mma.sync reaches of cuBLAS's rate. From sm_90 on, cuBLAS uses wgmma or tcgen05, which mma.sync cannot follow: 60
// to 65 % is commonly seen on Hopper, far less on sm_100. Assumed, not measured.
double mma_share(int arch);

}  // namespace shrank
