// A pair of factors, and what belongs to it alone. A layer has one; a gated layer, whose y is activation(gate) value, has
// those of the gate and of the value. Of a pivoted pair, R of the N columns of h up^T + bias are h + pivot_bias instead,
// and up has rows for the others alone.
#pragma once

#include <cstdint>

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; R is a multiple of 8.
struct Pair {
  const void* down;  // (R, K) or null, where h is given
  const void* up;  // (N, R), pivoted (N - R, R)
  const void* bias;  // (N) or null, pivoted (N - R)
  void* h;  // (M, R)
  int R;
  const void* pivot_bias = nullptr;  // (R) or null
  const int32_t* order = nullptr;  // (N), of each column of y its place among those of h and then the others
};

}  // namespace shrank
