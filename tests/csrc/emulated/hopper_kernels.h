// The kernel for sm_90a on the emulator, whole or with one mistake.
#pragma once

#include <string>
#include <vector>

#include "../../../csrc/emulator/launch.h"

namespace shrank::tests {

std::vector<std::string> mistakes();  // "none" first

// c (M, N) = a (M, K) b (N, K)^T, all of 16 bits, contiguous and aligned to 16 bytes; K is a multiple of 8, N even.
// Throws std::invalid_argument if there is no such mistake or dtype.
emulator::Result tiled_product(const std::string& mistake, const std::string& dtype, int M, int N, int K, const void* a,
                               const void* b, void* c, const emulator::Options& options);

}  // namespace shrank::tests
