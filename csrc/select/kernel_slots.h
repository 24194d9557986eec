// What the matrix kernels issue: counted in their SASS (nvcc 13.0). tests/csrc/test_sass_loops.py holds those of panels
// and of ends to what is compiled.
#pragma once

#include "linear_tile.h"
#include "vocabulary.h"

namespace shrank {

// A step multiplies a panel of each operand, 64 numbers of 16 bits wide. Beside its products a warp issues a number that
// does not depend on the tile, and some for each of its copies of 16 bytes.
struct StepSlots { double own, per_copy; };
inline constexpr StepSlots kPanelStep{28, 6};
inline constexpr StepSlots kWindowStep{272, 44};  // convolutions: copies of x, by chunks
inline constexpr double kNumberSlots = 24;  // of a convolution that reads number by number, for each of them

// Of a warp whose sums are 16 fragments_m by 8 fragments_n: HMMA and LDSM.
constexpr double product_slots(int fragments_m, int fragments_n) {
  constexpr int kProducts = LinearTile::kPanel / 16;
  return kProducts * (fragments_m * fragments_n + fragments_m + fragments_n / 2.0);
}

// Its sums of h, rounded into panels: two roundings and two stores for each fragment.
inline constexpr double kRoundSlots = 4;

// For 8 neighbouring numbers of y: rounded and stored; and what may come to them.
inline constexpr double kStoreSlots = 47, kBiasSlots = 13, kResidualSlots = 22, kPreactivationSlots = 13;
constexpr double activation_slots(Activation activation) {
  switch (activation) {
    case Activation::none: return 0;
    case Activation::relu: return 15;
    case Activation::gelu: return 80;
    case Activation::gelu_tanh: return 62;
    case Activation::silu: return 42;
  }
  return 0;
}

// A filter's product with one channel of one tap, on CUDA cores.
inline constexpr double kDepthwiseSlots = 6.1;

}  // namespace shrank
