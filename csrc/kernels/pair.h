// A pair of factors, and what belongs to it alone. A layer has one; a gated layer, whose y is activation(gate) value, has
// those of the gate and of the value.
#pragma once

namespace shrank {

// All row-major, contiguous and aligned to 16 bytes; R is a multiple of 8.
struct Pair {
  const void* down;  // (R, K) or null, where h is given
  const void* up;  // (N, R)
  const void* bias;  // (N) or null
  void* h;  // (M, R)
  int R;
};

}  // namespace shrank
